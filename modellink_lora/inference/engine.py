"""Prompts in, answers out, on the leader: which prompt is in which row of the cache, and what is computed next.

A row keeps its tokens after its prompt has ended, so a later prompt that begins alike (the next turn of a chat, the
same examples before another question) computes only what is new.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from modellink_lora.config.errors import UserError
from modellink_lora.inference.beam import Beams
from modellink_lora.inference.executor import Executor
from modellink_lora.inference.request import (
    BASE,
    GREEDY,
    PLAIN,
    Choice,
    Completion,
    NotFinite,
    Request,
    Sampling,
    Score,
    Token,
    not_finite,
)
from modellink_lora.inference.rows import Prompt, Rows, Wanted
from modellink_lora.inference.sampling import choose
from modellink_lora.inference.text import TextStream, holds_stop, visible_text

_BEGINNING = 16  # tokens that prompts have in common where they are scored in one batch


@dataclass(eq=False)
class _Running:
    """A prompt on its way."""

    number: int
    request: Request
    limit: int  # tokens of the answer at most
    text: TextStream | None
    answer: list[int] = field(default_factory=list)
    row: int = -1

    @property
    def tokens(self) -> list[int]:
        return [*self.request.ids, *self.answer]


class Engine:
    """A model that answers. One process calls it; executor.py has the others follow.

    Args:
        choices: names of the adapters that are loaded.
        max_batch: prompts computed at once.
        max_length: tokens of prompt and answer together.
        use_cache: without it every step computes all tokens anew, which is slow and gives the same.
    """

    def __init__(
        self, executor: Executor, tokenizer: Any = None, *, choices: Sequence[str] = (), max_batch: int = 8,
        max_length: int, use_cache: bool = True,
    ) -> None:  # fmt: skip
        self.executor, self.tokenizer = executor, tokenizer
        self.choices, self.max_batch, self.max_length = tuple(choices), max_batch, max_length
        self.vocab_size = executor.vocab_size
        self._use_cache = use_cache
        self._rows = Rows(executor, max_length=max_length, use_cache=use_cache)
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._numbers = itertools.count()

    # Many prompts at once.

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def check(self, request: Request) -> None:
        """Raise UserError when `request` can never be answered."""
        self._check_ids(request.ids)
        if request.choice.adapter not in (BASE, *self.choices):
            names = ", ".join((BASE, *self.choices))
            raise UserError(f"no adapter is called {request.choice.adapter!r}: choose {names}")
        if len(request.ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(request.ids)} tokens, prompt and answer together may have {self.max_length}: "
                "shorten it"
            )
        if request.max_new_tokens < 1:
            raise UserError(f"an answer of at most {request.max_new_tokens} tokens was asked for: give at least 1")

    def submit(self, request: Request) -> int:
        """Number of a request that from now on takes part in `step`."""
        self.check(request)
        text = TextStream(self.tokenizer, request.stop) if self.tokenizer is not None else None
        limit = min(request.max_new_tokens, self.max_length - len(request.ids))
        self._waiting.append(_Running(next(self._numbers), request, limit, text))
        return self._waiting[-1].number

    def cancel(self, number: int) -> None:
        """Let a request go, wherever it is; one that has ended is no error."""
        self._waiting = deque(one for one in self._waiting if one.number != number)
        for one in [one for one in self._running if one.number == number]:
            self._release(one)

    def step(self) -> list[tuple[int, Token | NotFinite]]:
        """One token of every running request, after those waiting have taken the free rows.

        A request whose logits are not finite ends with NotFinite instead; the others go on.
        """
        admitted = self._admit()
        self._close_ranks()
        logits = [*self._first_logits(admitted), *self._next_logits([x for x in self._running if x not in admitted])]
        return [(one.number, self._token(one, row)) for one, row in sorted(logits, key=lambda pair: pair[0].number)]

    def generate(
        self, requests: Sequence[Request], *, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """The answers, in order. `progress` is told how many more have ended. Raises NotFinite for the first of them
        that cannot be computed."""
        assert not self.busy
        for request in requests:
            self.check(request)
        self._rows.reserve(
            min(len(requests), self.max_batch),
            max((len(request.ids) + request.max_new_tokens for request in requests), default=0),
        )
        answers = {self.submit(request): Completion() for request in requests}
        while self.busy:
            ended = 0
            for number, token in self.step():
                if isinstance(token, NotFinite):
                    self._drop_all()
                    index = list(answers).index(number)
                    raise NotFinite(token.what, prompt=f"prompt {index + 1}", index=index)
                _add(answers[number], token)
                ended += token.finish is not None
            if progress and ended:
                progress(ended)
        return list(answers.values())

    def stream(self, request: Request) -> Iterator[Token]:
        """Tokens of one answer as they come. Closing the iterator ends the request. Raises NotFinite."""
        number = self.submit(request)
        try:
            while any(one.number == number for one in (*self._waiting, *self._running)):
                for of, token in self.step():
                    if of != number:
                        continue
                    if isinstance(token, NotFinite):
                        raise token
                    yield token
        finally:
            self.cancel(number)

    def _admit(self) -> list[_Running]:
        admitted = []
        while self._waiting and len(self._running) < self.max_batch:
            one = self._waiting.popleft()
            rows = 1 << len(self._running).bit_length()  # a cache that grows is made anew: by powers of two
            self._rows.reserve(min(rows, self.max_batch), len(one.request.ids) + one.limit)
            taken = [other.row for other in self._running]
            one.row = self._rows.best(one.request.ids, one.request.choice, taken)
            self._running.append(one)
            admitted.append(one)
        return admitted

    def _close_ranks(self) -> None:
        """Move the last rows into those that have become free: keys of rows side by side need no copy at each step."""
        free = sorted(set(range(len(self._running))) - {one.row for one in self._running})
        for one in [one for one in self._running if one.row >= len(self._running)]:
            target = free.pop()
            self._rows.copy([one.row], [target], len(one.tokens))
            one.row = target

    def _first_logits(self, admitted: Sequence[_Running]) -> list[tuple[_Running, Tensor]]:
        """After whole prompts."""
        found = []
        for choice, group in _by_choice(admitted):
            prompts = [(one.row, one.request.ids) for one in group]
            self._rows.share(prompts, choice)
            wanted = [(row, len(ids) - 1, None) for row, ids in prompts]
            found += list(zip(group, self._rows.compute(prompts, choice, wanted), strict=True))
        return found

    def _next_logits(self, running: Sequence[_Running]) -> list[tuple[_Running, Tensor]]:
        """After one more token."""
        found = []
        for choice, group in _by_choice(sorted(running, key=lambda one: one.row)):
            rows = [(one.row, one.tokens) for one in group]
            wanted = [(row, len(tokens) - 1, None) for row, tokens in rows]
            found += list(zip(group, self._rows.compute(rows, choice, wanted), strict=True))
        return found

    def _token(self, one: _Running, logits: Tensor) -> Token | NotFinite:
        request, at = one.request, f"at token {len(one.answer) + 1} of the answer"
        if math.isnan(logits[0]):
            self._release(one)
            self._rows.forget([one.row])
            return self._not_finite(at, request.choice)
        try:
            chosen = choose(logits, one.tokens, request.sampling, len(one.answer))
        except UserError as error:
            self._release(one)
            return NotFinite(f"{at}: {error}")
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(request.top_logprobs) if request.top_logprobs else None
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
        text, finish = "", None
        if chosen in request.stop_ids:
            finish = "stop"
        else:
            one.answer.append(chosen)
            if one.text:
                text, stopped = one.text.push(chosen)
                finish = "stop" if stopped else None
            if finish is None and len(one.answer) >= one.limit:
                finish = "length"
        if finish:
            if one.text and (finish == "length" or chosen in request.stop_ids):
                text += one.text.end(chosen if chosen in request.stop_ids else None)
            self._release(one)
        return Token(chosen, text, float(logprobs[chosen]), top, finish, counted=chosen not in request.stop_ids)

    def _release(self, one: _Running) -> None:
        self._running.remove(one)

    def _drop_all(self) -> None:
        self._waiting.clear()
        self._running.clear()
        self._rows.forget()

    def _not_finite(self, at: str, choice: Choice) -> NotFinite:
        return not_finite(at, choice, self.executor.dtype)

    # One prompt, several answers at once.

    def beam_search(
        self, ids: Sequence[int], max_new_tokens: int, *, num_beams: int = 2, length_penalty: float = 1.0,
        sampling: Sampling = GREEDY, stop_ids: frozenset[int] = frozenset(), stop: Sequence[str] = (),
        choice: Choice = PLAIN, num_return: int = 1,
    ) -> list[Completion]:  # fmt: skip
        """The best answers of a beam search (beam.py), best first; at a temperature above 0 each step is drawn.

        A beam whose text has come to one of `stop` is complete, with the tokens of the stop text in `ids`.

        Raises NotFinite where a beam's logits are not finite: which beams are best is then unknown.
        """
        assert not self.busy

        def finite(logits: Tensor) -> Tensor:
            if logits[:, 0].isnan().any():
                self._rows.forget()
                raise self._not_finite(f"at token {len(beams.tokens[0]) + 1} of the answer", choice)
            return logits

        self.check(Request(tuple(ids), max_new_tokens, choice=choice))
        limit = min(max_new_tokens, self.max_length - len(ids))
        beams = Beams(
            num_beams, limit, prompt=ids, length_penalty=length_penalty, stop_ids=stop_ids, sampling=sampling,
            ends=(lambda tokens: holds_stop(self.tokenizer, tokens, stop)) if stop else None,
        )  # fmt: skip
        self._rows.reserve(num_beams, len(ids) + limit)
        row = self._rows.best(ids, choice)
        logits = finite(self._rows.compute([(row, ids)], choice, [(row, len(ids) - 1, None)]))
        self._rows.copy([row] * num_beams, range(num_beams), len(ids))
        sources = beams.advance(logits.expand(num_beams, -1))
        while sources is not None:
            if sources != list(range(num_beams)):
                self._rows.copy(sources, range(num_beams), len(ids) + len(beams.tokens[0]) - 1)
            rows = [(beam, [*ids, *tokens]) for beam, tokens in enumerate(beams.tokens)]
            wanted: list[Wanted] = [(row, len(all_) - 1, None) for row, all_ in rows]
            sources = beams.advance(finite(self._rows.compute(rows, choice, wanted)))
        return [
            Completion(list(found), visible_text(self.tokenizer, found, stop) if self.tokenizer else "",
                       "stop" if ended else "length", [], score)
            for score, found, ended in beams.best(num_return)
        ]  # fmt: skip

    # How likely given answers are.

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, choice: Choice = PLAIN,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """Log-probabilities of continuations after contexts of at least one token, in order.

        Pairs that differ in their last token only are one forward pass; what pairs begin with in common is one too.
        Raises NotFinite for logits that are not finite.
        """
        assert not self.busy
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise UserError("scoring needs a context and a continuation of at least one token each")
            self._check_ids((*context, *continuation))
            if len(context) + len(continuation) > self.max_length + 1:
                raise UserError(f"{len(context)} tokens of context and {len(continuation)} of continuation are more "
                                f"than the model's {self.max_length}: shorten them")  # fmt: skip
            asked.setdefault((*context, *continuation[:-1]), []).append(number)
        found: dict[int, Score] = {}
        self._rows.reserve(min(len(asked), self.max_batch), max(map(len, asked), default=0))
        for batch in _alike(asked, self.max_batch):
            wanted: list[Wanted] = []
            prompts: list[Prompt] = []
            for ids in batch:
                row = self._rows.best(ids, choice, [row for row, _ in prompts])
                prompts.append((row, ids))
                for number in asked[ids]:
                    context, continuation = pairs[number]
                    wanted += [(row, len(context) - 1 + i, target) for i, target in enumerate(continuation)]
            self._rows.share(prompts, choice, upto=min(at for _, at, _ in wanted))
            values = iter(self._rows.compute(prompts, choice, wanted).tolist())
            for ids in batch:
                for number in asked[ids]:
                    each = [next(values) for _ in pairs[number][1]]
                    if any(math.isnan(logprob) for logprob, _ in each):
                        self._rows.forget()
                        at = next(n for n, (logprob, _) in enumerate(each) if math.isnan(logprob))
                        error = self._not_finite(f"at token {at + 1} of the continuation", choice)
                        raise NotFinite(error.what, prompt=f"prompt {number + 1}", index=number)
                    found[number] = Score([logprob for logprob, _ in each], all(best for _, best in each))
            if progress:
                progress(sum(len(asked[ids]) for ids in batch))
        return [found[number] for number in range(len(pairs))]

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UserError("the prompt has no token: write something, or choose a --prompt-type that adds some")
        if not all(0 <= token < self.vocab_size for token in ids):
            worst = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise UserError(f"token id {worst} is none of the model's {self.vocab_size}: give it its own tokenizer")


def _add(completion: Completion, token: Token) -> None:
    completion.text += token.text
    completion.tokens.append(token)
    if token.counted:
        completion.ids.append(token.id)
    if token.finish:
        completion.finish = token.finish


def _by_choice(running: Sequence[_Running]) -> list[tuple[Choice, list[_Running]]]:
    groups: dict[Choice, list[_Running]] = {}
    for one in running:
        groups.setdefault(one.request.choice, []).append(one)
    return list(groups.items())


def _alike(asked: dict[tuple[int, ...], list[int]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of prompts that begin alike, in them those of like length side by side."""
    for _, group in itertools.groupby(sorted(asked, key=lambda ids: (ids[:_BEGINNING], len(ids), ids)),
                                      key=lambda ids: ids[:_BEGINNING]):  # fmt: skip
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]
