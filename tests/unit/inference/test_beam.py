"""Beams whose continuations are drawn: they always find an answer, and draw from the shaped distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from modellink_lora.inference.beam import Beams
from modellink_lora.inference.request import Sampling

STOP = 7


def search(k: int, sampling: Sampling, logits: torch.Tensor, *, limit: int = 6) -> list[tuple[float, list[int], bool]]:
    """The best answers of a model that says [v] `logits` after whatever came before."""
    beams = Beams(k, limit, prompt=[1], stop_ids=frozenset({STOP}), sampling=sampling)
    while beams.advance(logits.expand(k, -1).clone()) is not None:
        pass
    return beams.best(k)


@pytest.mark.parametrize("certain", [3, STOP])
def test_a_distribution_of_one_token_still_gives_an_answer(certain: int) -> None:
    logits = torch.zeros(60)
    logits[certain] = 30.0
    for seed in range(20):
        for sampling in (Sampling(0.7, top_p=0.9, seed=seed), Sampling(0.7, top_k=1, seed=seed),
                         Sampling(0.7, min_p=0.5, seed=seed)):  # fmt: skip
            score, tokens, ended = search(2, sampling, logits)[0]
            assert score > -1e6 and (tokens, ended) == (([], True) if certain == STOP else ([3] * 6, False))


def test_draws_follow_the_shaped_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -50.0])
    p = (logits / 0.7).softmax(-1).tolist()
    # one beam draws two tokens, without replacement, and goes on with the likelier one
    expected = [sum(p[i] * q / (1 - p[i]) + q * p[i] / (1 - q) for q in p[i + 1 :]) for i in range(5)]
    counts: Counter[int] = Counter()
    for seed in range(2000):
        beams = Beams(1, 9, prompt=[1], sampling=Sampling(0.7, seed=seed))
        beams.advance(logits[None].clone())
        counts[beams.tokens[0][0]] += 1
    assert [counts[i] / 2000 for i in range(5)] == pytest.approx(expected, abs=0.03)
