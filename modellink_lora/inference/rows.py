"""What lies in the rows of the key/value cache, on the leader, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink_lora.inference.executor import Batch, Executor
from modellink_lora.inference.request import PLAIN, Choice

Prompt = tuple[int, Sequence[int]]  # a row, and the tokens that it is to hold
Wanted = tuple[int, int, int | None]  # a row, the index of a token in it, and the target to score after it

TOKENS_AT_ONCE = 2048  # of prompts, in one forward pass: bounds the memory of activations
_WORTH_SHARING = 16  # tokens that prompts begin with in common, from which on they are computed once for all
_STEP = 128  # a cache grows to multiples of this


@dataclass
class _Row:
    """Tokens whose keys and values lie there, and under which adapter they were computed."""

    tokens: list[int] = field(default_factory=list)
    choice: Choice = PLAIN

    def common(self, ids: Sequence[int], choice: Choice) -> int:
        """How many tokens of `ids` need not be computed."""
        return _common(self.tokens, ids) if choice == self.choice else 0


class Rows:
    """The rows, and the only caller of the executor.

    Args:
        use_cache: without it every token is computed anew each time.
    """

    def __init__(self, executor: Executor, *, max_length: int, use_cache: bool) -> None:
        self._executor, self._max_length, self._use_cache = executor, max_length, use_cache
        self._rows: list[_Row] = []

    def reserve(self, rows: int, slots: int) -> None:
        slots = min(-(-slots // _STEP) * _STEP, self._max_length)
        self._executor.reserve(max(rows, len(self._rows), 1), slots)
        self._rows += [_Row() for _ in range(rows - len(self._rows))]

    def best(self, ids: Sequence[int], choice: Choice, taken: Collection[int] = ()) -> int:
        """The row not in `taken` that already begins most like `ids`, else the first."""
        free = [row for row in range(len(self._rows)) if row not in taken]
        return max(free, key=lambda row: (self._rows[row].common(ids, choice), -row))

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Let rows `target` hold the first `length` tokens of rows `source`, as those are now."""
        self._executor.copy(source, target, length)
        found = [_Row(self._rows[row].tokens[:length], self._rows[row].choice) for row in source]
        for row, held in zip(target, found, strict=True):
            self._rows[row] = held

    def forget(self, rows: Sequence[int] | None = None) -> None:
        """Empty `rows`, by default all: what lies there is not finite."""
        rows = list(range(len(self._rows))) if rows is None else rows
        self._executor.clear(rows)
        for row in rows:
            self._rows[row] = _Row()

    def share(self, prompts: Sequence[Prompt], choice: Choice, *, upto: int | None = None) -> None:
        """Let the rows of `prompts` begin with what any row of the cache, or one of them, has of theirs already.

        Args:
            upto: tokens that may be shared at most; by default all but the last, whose logits are always wanted.
        """
        if not self._use_cache:
            return
        for number, (row, ids) in enumerate(prompts):
            most = len(ids) - 1 if upto is None else upto
            first, first_ids = prompts[0]
            with_first = _common(first_ids, ids)
            if number == 1 and with_first - self._rows[first].common(first_ids, choice) >= _WORTH_SHARING:
                begin = min(with_first, most, len(first_ids) - 1)
                self.compute([(first, first_ids[:begin])], choice, [])
            source = max(range(len(self._rows)), key=lambda r: self._rows[r].common(ids, choice))
            length = min(self._rows[source].common(ids, choice), most)
            if length - self._rows[row].common(ids, choice) >= _WORTH_SHARING:
                self.copy([source], [row], length)

    def compute(
        self, prompts: Sequence[Prompt], choice: Choice,
        wanted: Sequence[Wanted],
    ) -> Tensor:  # fmt: skip
        """Fill the rows with these tokens and return what `wanted` (row, index of the token, target) asks for.

        A token that is wanted is computed even where it lies in the cache already; long rows go in pieces.
        """
        results: dict[int, Tensor] = {}
        firsts: dict[int, int] = {}
        for row, at, _ in wanted:
            firsts[row] = min(at, firsts.get(row, at))
        done = {row: 0 for row, _ in prompts}
        if self._use_cache:
            done = {row: min(self._rows[row].common(ids, choice), firsts.get(row, len(ids))) for row, ids in prompts}
        left = [(row, ids) for row, ids in sorted(prompts, key=lambda prompt: prompt[0]) if done[row] < len(ids)]
        while left:
            chunk: list[tuple[int, Sequence[int], int, int]] = []
            width = 0
            for row, ids in left:
                wider = max(width, min(len(ids) - done[row], TOKENS_AT_ONCE))
                if chunk and wider * (len(chunk) + 1) > TOKENS_AT_ONCE:
                    break
                width = wider
                chunk.append((row, ids, done[row], min(len(ids), done[row] + TOKENS_AT_ONCE)))
            at_row = {row: number for number, (row, *_) in enumerate(chunk)}
            asked = [
                (number, at_row[row], at - chunk[at_row[row]][2], target)
                for number, (row, at, target) in enumerate(wanted)
                if row in at_row and chunk[at_row[row]][2] <= at < chunk[at_row[row]][3]
            ]
            targets = [target for *_, target in asked if target is not None]
            values = self._executor.forward(
                Batch(
                    choice, [row for row, *_ in chunk], [begin for _, _, begin, _ in chunk],
                    [list(ids[begin:end]) for _, ids, begin, end in chunk],
                    [(number, at) for _, number, at, _ in asked], targets or None,
                )
            )  # fmt: skip
            results |= {number: value for (number, *_), value in zip(asked, values, strict=True)}
            for row, ids, _, end in chunk:
                done[row] = end
                self._rows[row] = _Row(list(ids[:end]), choice)
            left = [(row, ids) for row, ids in left if done[row] < len(ids)]
        return torch.stack([results[number] for number in range(len(wanted))]) if wanted else torch.empty(0)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    shorter = min(len(one), len(other))
    if list(one[:shorter]) == list(other[:shorter]):
        return shorter
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), shorter)
