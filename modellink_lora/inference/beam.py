"""Beam search over one prompt: which beams go on with which token, and which are complete. Pure.

The rules are those of transformers' `generate` with `early_stopping=False`, so that both give the same answers:
of the 2 k (or with more stop tokens, more) best continuations those that end are complete if they are among the k best;
the search stops when k are complete and no running beam, at its present length, beats the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink_lora.inference.request import GREEDY, Sampling
from modellink_lora.inference.sampling import generator, shaped

_NO_CHANCE = -1e8  # below it lie the totals of beams that only fill a place
_FILLER = -1e9


@dataclass(frozen=True)
class _Complete:
    score: float  # total log-probability / tokens ** length_penalty
    tokens: list[int]  # without the one that ended it
    ended: bool  # by a stop token or a stop text


class Beams:
    """Letters: k beams, v vocabulary.

    Args:
        limit: tokens of an answer at most.
        prompt: its tokens count as seen for the repetition penalty.
        sampling: at a temperature above 0 the continuations of each step are drawn, without replacement, instead of
            being the best; at 0 its repetition penalty counts.
        ends: whether an answer with these tokens has come to a stop text.
    """

    def __init__(
        self, k: int, limit: int, *, prompt: Sequence[int], length_penalty: float = 1.0,
        stop_ids: frozenset[int] = frozenset(), sampling: Sampling = GREEDY,
        ends: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:  # fmt: skip
        self._ends = ends or (lambda tokens: False)
        self._k, self._limit, self._prompt, self._penalty = k, limit, prompt, length_penalty
        self._stop_ids, self._draws = stop_ids, sampling.temperature > 0
        self._sampling = sampling if self._draws else Sampling(repetition_penalty=sampling.repetition_penalty)
        self.tokens: list[list[int]] = [[] for _ in range(k)]
        self._totals = torch.tensor([0.0] + [_FILLER] * (k - 1))  # all beams are the same at first: one of them counts
        self._complete: list[_Complete] = []

    def advance(self, logits: Tensor) -> list[int] | None:
        """One step on fp32 logits [k, v] after `tokens`: which beam each new one continues; None at the end."""
        logprobs = logits.log_softmax(-1)
        if self._sampling != GREEDY:
            seen = [[*self._prompt, *tokens] for tokens in self.tokens]
            # one token more than can end an answer: every beam has a way to go on, as in transformers
            keep = len(self._stop_ids) + 1
            logprobs = torch.stack([shaped(row, ids, self._sampling, keep=keep) for row, ids in zip(logprobs, seen)])
        totals = (logprobs + self._totals[:, None]).flatten()
        wanted = max(2, 1 + len(self._stop_ids)) * self._k
        length = len(self.tokens[0]) + 1
        if self._draws:
            # the order of totals + Gumbel noise draws without replacement (arXiv:1903.06059), and also ranks what is
            # too unlikely for a float
            noise = torch.rand(totals.shape, dtype=torch.float64, generator=generator(self._sampling.seed, length))
            indices = (totals - (-noise.log()).log()).topk(min(wanted, len(totals))).indices
            values = totals[indices]
        else:
            values, indices = totals.topk(min(wanted, len(totals)))
        sources, running, running_totals = [], [], []
        for rank, (total, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            beam, token = divmod(index, logits.shape[-1])
            tokens, hidden = [*self.tokens[beam], token], token in self._stop_ids
            stopped = hidden or (total > _NO_CHANCE and self._ends(tokens))
            if stopped or length == self._limit:
                if rank < self._k and total > _NO_CHANCE:
                    score = total / length**self._penalty
                    self._complete.append(_Complete(score, tokens[:-1] if hidden else tokens, stopped))
            else:
                running.append(tokens)
                sources.append(beam)
                running_totals.append(total)
        self._complete = sorted(self._complete, key=lambda one: -one.score)[: self._k]
        best = sorted(range(len(running)), key=lambda i: -running_totals[i])[: self._k]
        if length == self._limit or not best or running_totals[best[0]] <= _NO_CHANCE:
            return None
        filling = self._k - len(best)  # stop texts may end more beams than candidates were taken for
        self._totals = torch.tensor([*(running_totals[i] for i in best), *[_FILLER] * filling])
        best += best[:1] * filling
        self.tokens = [running[i] for i in best]
        full = len(self._complete) == self._k
        if full and running_totals[best[0]] / length**self._penalty <= self._complete[-1].score:
            return None
        return [sources[i] for i in best]

    def best(self, count: int) -> list[tuple[float, list[int], bool]]:
        """(score, tokens, whether a stop token ended it) of the best complete answers."""
        return [(one.score, one.tokens, one.ended) for one in self._complete[:count]]
