"""Shaping of the distribution is that of transformers; drawing follows the distribution and the seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as hf

from modellink_lora.inference.request import Sampling
from modellink_lora.inference.sampling import choose, shaped, uniform

LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 3
SEEN = [3, 7, 7, 20]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.6),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, min_p=0.05),
        Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    ],
)
def test_shaping_equals_transformers(sampling: Sampling) -> None:
    processors = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(hf.MinPLogitsWarper(sampling.min_p))
    expected = processors(torch.tensor([SEEN]), LOGITS[None].clone())[0]
    assert torch.equal(shaped(LOGITS, SEEN, sampling), expected)


def test_greedy_takes_the_best_after_the_penalty() -> None:
    best, second = LOGITS.topk(2).indices.tolist()
    assert choose(LOGITS, [], Sampling(), 0) == best
    assert choose(LOGITS, [best], Sampling(repetition_penalty=10.0), 0) == second


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=4)
    expected = shaped(LOGITS, [], sampling).softmax(-1)
    count = 4000
    found = Counter(choose(LOGITS, [], Sampling(1.0, 4, seed=seed), seed % 7) for seed in range(count))
    assert set(found) == set(expected.nonzero().flatten().tolist())
    for token, times in found.items():
        p = expected[token].item()
        assert abs(times - count * p) < 5 * (count * p * (1 - p)) ** 0.5  # five standard deviations


def test_numbers_depend_on_seed_and_position_only() -> None:
    assert uniform(1, 0) == uniform(1, 0)
    assert len({uniform(seed, number) for seed in range(20) for number in range(20)}) == 400
