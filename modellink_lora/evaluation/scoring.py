"""What a model answers: each choice's log-probability as the continuation of a prompt, or a text it writes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.item import Item, Task
from modellink_lora.inference.request import Choice, Completion, NotFinite, Request, Sampling, Score

Ids = list[int]
Advance = Callable[[int], None]


class Engine(Protocol):
    """What this package needs of inference's engine."""

    tokenizer: Any
    max_length: int
    choices: tuple[str, ...]

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, choice: Choice, progress: Advance | None = None
    ) -> list[Score]: ...
    def generate(self, requests: Sequence[Request], *, progress: Advance | None = None) -> list[Completion]: ...


class Prompter(Protocol):
    """What this package needs of the text side."""

    stop_ids: frozenset[int]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Ids: ...
    def plain(self, text: str) -> Ids: ...
    def answer(self, text: str) -> Ids: ...


@dataclass(frozen=True)
class Writing:
    """How answers are written, and whether those with choices are too."""

    always: bool
    max_new_tokens: int
    sampling: Sampling


@dataclass
class Answer:
    """What one model did with one item.

    Args:
        scores: log-probability of each choice.
        text: what it wrote.
        cut: tokens of the prompt that did not fit and were left out at its beginning.
    """

    prediction: str
    correct: bool
    cut: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    text: str | None = None

    def as_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"prediction": self.prediction, "correct": self.correct}
        optional = {"scores": self.scores, "text": self.text, "cut": self.cut}
        return values | {key: value for key, value in optional.items() if value}


def is_written(item: Item, writing: Writing) -> bool:
    return writing.always or not item.choices


class Answering:
    """Has models answer the items of one task."""

    def __init__(self, task: Task, engine: Engine, prompter: Prompter, writing: Writing, models: Sequence[str]) -> None:
        self._task, self._engine, self._prompter, self._writing = task, engine, prompter, writing
        self._models = models

    def answers(self, items: Sequence[Item], progress: Advance) -> list[dict[str, Answer]]:
        """The answers of each model to each item. `progress` is told how many more there are."""
        written = [is_written(item, self._writing) for item in items]
        scored = iter(self._scored([item for item, w in zip(items, written) if not w], progress))
        others = iter(self._written([item for item, w in zip(items, written) if w], progress))
        return [next(others if w else scored) for w in written]

    def _scored(self, items: Sequence[Item], progress: Advance) -> list[dict[str, Answer]]:
        found: list[dict[str, Answer]] = [{} for _ in items]
        pairs, cuts, owners = [], [], []
        for item in items:
            for context, continuation in continuations(item, self._prompter):
                # the continuation's last token is only compared with, so it takes no position
                shown = _fitting(context, self._engine.max_length + 1 - len(continuation), item)
                pairs.append((shown, continuation))
                cuts.append(len(context) - len(shown))
                owners.append(item)
        for model in self._models if items else ():
            advance = _in_steps(progress, len(items), len(pairs))
            with _naming(owners):
                totals = iter([one.total for one in self._engine.score(pairs, choice=Choice(model), progress=advance)])
            cut = iter(cuts)
            for item, answers in zip(items, found):
                scores = {name: next(totals) for name in item.choices}
                best = max(scores, key=scores.__getitem__)  # the first of equals
                answers[model] = Answer(best, self._task.judge(best, item), max(next(cut) for _ in scores), scores)
        return found

    def _written(self, items: Sequence[Item], progress: Advance) -> list[dict[str, Answer]]:
        found: list[dict[str, Answer]] = [{} for _ in items]
        requests, cuts = [], []
        for item in items:
            plain = isinstance(item.prompt, str)
            ids = self._prompter.plain(str(item.prompt)) if plain else self._prompter.chat(_messages(item))
            shown = _fitting(ids, self._engine.max_length - self._writing.max_new_tokens, item)
            cuts.append(len(ids) - len(shown))
            requests.append(
                Request(
                    ids=tuple(shown),
                    max_new_tokens=self._writing.max_new_tokens,
                    sampling=self._writing.sampling,
                    stop_ids=self._prompter.stop_ids,
                    stop=self._task.stop if plain else (),
                )
            )
        for model in self._models if items else ():
            asked = [dataclasses.replace(request, choice=Choice(model)) for request in requests]
            with _naming(items):
                completions = self._engine.generate(asked, progress=progress)
            for item, answers, cut, completion in zip(items, found, cuts, completions, strict=True):
                prediction = self._task.read(item, completion.text)
                answers[model] = Answer(prediction, self._task.judge(prediction, item), cut, text=completion.text)
        return found


@contextlib.contextmanager
def _naming(owners: Sequence[Item]) -> Iterator[None]:
    """Inside the block logits that are not finite name their question; `owners` are in the order of what is asked."""
    try:
        yield
    except NotFinite as error:
        item = owners[error.index]
        prompt = f"{item.subject}, question {item.number + 1}"
        raise NotFinite(error.what, prompt=prompt, index=error.index) from None


def _in_steps(progress: Advance, items: int, pairs: int) -> Advance:
    """Tells `progress` of items what is said of pairs."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        progress(done * items // pairs - before * items // pairs)

    return advance


def continuations(item: Item, prompter: Prompter) -> list[tuple[Ids, Ids]]:
    """(context, continuation) ids of every choice.

    Of a plain prompt the continuation is what follows the context's ids when both are encoded as one text; blanks at
    the context's end belong to it. So does lm-eval, and so do scores come out equal. Where a tokenizer joins the last
    letters of the context with the choice until nothing would be left, both are cut where the encodings part.

    In a conversation the answer is encoded on its own, as it was in training.
    """
    if not isinstance(item.prompt, str):
        context = prompter.chat(_messages(item))
        return [(context, prompter.answer(text)) for text in item.choices.values()]
    prompt = item.prompt.rstrip()
    context, pairs = prompter.plain(prompt), []
    for text in item.choices.values():
        whole = prompter.plain(item.prompt + text)
        shared = len(context)
        if len(whole) <= shared:
            shared = next(n for n in range(len(whole)) if n == len(whole) - 1 or whole[n] != context[n])
        pairs.append((context if shared == len(context) else whole[:shared], whole[shared:]))
    return pairs


def _messages(item: Item) -> list[dict[str, str]]:
    assert not isinstance(item.prompt, str)
    return [{"role": message.role, "content": message.content} for message in item.prompt]


def _fitting(ids: Ids, room: int, item: Item) -> Ids:
    """The end of `ids` that fits: what is asked stands at the end, the oldest example at the beginning."""
    if room < 1:
        raise UserError(
            f"{item.subject}, question {item.number + 1}: nothing of the prompt fits beside the answer's tokens: give "
            "a smaller --max-new-tokens or a larger --max-length"
        )
    return ids if len(ids) <= room else ids[-room:]
