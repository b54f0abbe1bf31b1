"""What a model answers: each choice's log-probability as the continuation of a prompt, or a text it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modellink_lora.config.errors import UserError
from modellink_lora.data.prompt import Message
from modellink_lora.evaluation.item import Item, Task
from modellink_lora.inference.request import Choice, Completion, Request, Sampling, Score

Ids = list[int]


class Engine(Protocol):
    """What this package needs of inference's engine."""

    tokenizer: Any
    max_length: int
    choices: tuple[str, ...]

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, choice: Choice) -> list[Score]: ...
    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


class Prompter(Protocol):
    """What this package needs of the text side."""

    stop_ids: frozenset[int]

    def chat(self, messages: Sequence[Message]) -> Ids: ...
    def plain(self, text: str) -> Ids: ...


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


def answers(
    items: Sequence[Item], task: Task, engine: Engine, prompter: Prompter, choice: Choice, writing: Writing
) -> list[Answer]:
    """The answers of one model to `items`, in their order."""
    found: dict[int, Answer] = {}
    written = [n for n, item in enumerate(items) if is_written(item, writing)]
    scored = [n for n in range(len(items)) if n not in set(written)]
    for numbers, answer in ((scored, _scored), (written, _written)):
        if numbers:
            chosen = [items[n] for n in numbers]
            found |= dict(zip(numbers, answer(chosen, task, engine, prompter, choice, writing), strict=True))
    return [found[n] for n in range(len(items))]


def _scored(
    items: Sequence[Item], task: Task, engine: Engine, prompter: Prompter, choice: Choice, writing: Writing
) -> list[Answer]:
    pairs, cuts = [], []
    for item in items:
        for context, continuation in continuations(item, prompter, engine.tokenizer):
            shown = _fitting(context, engine.max_length - len(continuation), item)
            pairs.append((shown, continuation))
            cuts.append(len(context) - len(shown))
    totals = iter(score.total for score in engine.score(pairs, choice=choice))
    cut = iter(cuts)
    result = []
    for item in items:
        scores = {name: next(totals) for name in item.choices}
        best = max(scores, key=lambda name: scores[name])  # the first of equals
        result.append(Answer(best, task.judge(best, item), max(next(cut) for _ in scores), scores))
    return result


def continuations(item: Item, prompter: Prompter, tokenizer: Any) -> list[tuple[Ids, Ids]]:
    """(context, continuation) ids of every choice.

    Of a plain prompt the continuation is what follows the context's ids when both are encoded as one text; blanks at
    the context's end belong to it. So does lm-eval, and so do scores come out equal. Where a tokenizer joins the last
    letters of the context with the choice until nothing would be left, both are cut where the encodings part.

    In a conversation the answer is encoded on its own, as it was in training.
    """
    if not isinstance(item.prompt, str):
        context = prompter.chat(item.prompt)
        return [(context, tokenizer.encode(text, add_special_tokens=False)) for text in item.choices.values()]
    prompt = item.prompt.rstrip()
    context, pairs = prompter.plain(prompt), []
    for text in item.choices.values():
        whole = prompter.plain(item.prompt + text)
        shared = len(context)
        if len(whole) <= shared:
            shared = next(n for n in range(len(whole)) if n == len(whole) - 1 or whole[n] != context[n])
        pairs.append((context if shared == len(context) else whole[:shared], whole[shared:]))
    return pairs


def _written(
    items: Sequence[Item], task: Task, engine: Engine, prompter: Prompter, choice: Choice, writing: Writing
) -> list[Answer]:
    requests, cuts = [], []
    for item in items:
        plain = isinstance(item.prompt, str)
        ids = prompter.plain(item.prompt) if isinstance(item.prompt, str) else prompter.chat(item.prompt)
        shown = _fitting(ids, engine.max_length - writing.max_new_tokens, item)
        cuts.append(len(ids) - len(shown))
        requests.append(
            Request(
                tuple(shown), writing.max_new_tokens, writing.sampling, prompter.stop_ids, task.stop if plain else (),
                choice,
            )
        )  # fmt: skip
    result = []
    for item, cut, completion in zip(items, cuts, engine.generate(requests), strict=True):
        prediction = task.read(item, completion.text)
        result.append(Answer(prediction, task.judge(prediction, item), cut, text=completion.text))
    return result


def _fitting(ids: Ids, room: int, item: Item) -> Ids:
    """The end of `ids` that fits: what is asked stands at the end, the oldest example at the beginning."""
    if room < 1:
        raise UserError(
            f"{item.subject}, question {item.number + 1}: nothing of the prompt fits beside the answer's tokens: give "
            "a smaller --max-new-tokens or a larger --max-length"
        )
    return ids if len(ids) <= room else ids[-room:]
