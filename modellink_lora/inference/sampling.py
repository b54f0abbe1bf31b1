"""From logits to the next token. Pure: one random number a token decides, drawn from (seed, number of the token)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modellink_lora.config.errors import UserError
from modellink_lora.inference.request import Sampling

_COLDEST = 1e-6  # below it quotients overflow, and the most likely token has all the probability already


def shaped(logits: Tensor, seen: Sequence[int], sampling: Sampling, *, keep: int = 1) -> Tensor:
    """fp32 logits [v] after penalty, temperature, top-k, top-p and min-p; tokens that are out stand at -inf.

    Args:
        seen: ids of prompt and answer so far.
        keep: at least that many of the most likely tokens stay.
    """
    if sampling.repetition_penalty != 1.0 and seen:
        ids = torch.tensor(sorted(set(seen)))
        penalised = logits[ids]
        factor = sampling.repetition_penalty
        logits = logits.clone()
        logits[ids] = torch.where(penalised < 0, penalised * factor, penalised / factor)
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / max(sampling.temperature, _COLDEST)
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(max(sampling.top_k, keep)).values[-1], float("-inf"))
    if sampling.top_p < 1.0:
        rising, order = logits.sort()
        out = rising.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[-keep:] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(0, order, out), float("-inf"))
    if sampling.min_p > 0.0:
        probabilities = logits.softmax(-1)
        out = probabilities < sampling.min_p * probabilities.max()
        out[logits.topk(keep).indices] = False
        logits = logits.masked_fill(out, float("-inf"))
    return logits


def choose(logits: Tensor, seen: Sequence[int], sampling: Sampling, number: int) -> int:
    """The id of the next token, the answer's `number`th, from fp32 logits [v] on the CPU.

    The distribution function over tokens from the likeliest down is inverted at one uniform number, so that rounding in
    the logits, which differs between layouts, moves a choice only where the number falls within that rounding.
    """
    if sampling.temperature == 0.0:
        return int(shaped(logits, seen, Sampling(repetition_penalty=sampling.repetition_penalty)).argmax())
    probabilities = shaped(logits, seen, sampling).double().softmax(-1)
    falling, order = probabilities.sort(descending=True, stable=True)
    if math.isnan(falling[0]):  # NaN is sorted to the front
        raise UserError(f"{sampling} makes numbers that are not finite of the model's logits: choose milder settings")
    at = int(torch.searchsorted(falling.cumsum(-1), uniform(sampling.seed, number), right=True))
    return int(order[min(at, int((falling > 0).sum()) - 1)])


def uniform(seed: int, number: int) -> float:
    """In [0, 1): the same for a seed and a number wherever it is drawn."""
    return float(torch.rand((), dtype=torch.float64, generator=generator(seed, number)))


def generator(seed: int, number: int) -> torch.Generator:
    """A stream of random numbers on the CPU for each seed and number; odd factors spread neighbours apart."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % 2**63)
