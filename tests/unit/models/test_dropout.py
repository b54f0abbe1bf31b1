"""Dropout masks are numbers of seed, site, sample, position and feature, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modellink_lora.device.hashing import dropped, mix
from modellink_lora.models import dropout
from modellink_lora.models.dropout import Dropout
from modellink_lora.parallel.random import row_keys, site_key

S, B, F, P = 16, 3, 40, 0.25
SAMPLES = torch.tensor([5, 2**33 + 5, 1_000_000])


@pytest.fixture(autouse=True)
def samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    now = [SAMPLES]
    monkeypatch.setattr(dropout, "current_samples", lambda: now[0])
    yield now


def layer(cut: str | None = None, rank: int = 0, *, p: float = P, site: int = 7) -> Dropout:
    module = Dropout(p, rank=rank, cut=cut)
    module.site = site
    return module


WHOLE = torch.ones(S, B, F)


def test_the_kept_elements_are_scaled_so_that_the_mean_stays() -> None:
    out = layer()(torch.ones(256, 3, 256))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (out == 0).float().mean().item() == pytest.approx(P, abs=0.005)


@pytest.mark.parametrize("cut, dimension", [("positions", 0), ("features", 2)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shards_of_tensor_ranks_join_to_the_whole_mask(cut: str, dimension: int, ranks: int) -> None:
    parts = WHOLE.chunk(ranks, dimension)
    joined = torch.cat([layer(cut, rank)(part) for rank, part in enumerate(parts)], dimension)
    assert torch.equal(joined, layer()(WHOLE))
    wrong = torch.cat([layer(None, rank)(part) for rank, part in enumerate(parts)], dimension)
    assert not torch.equal(wrong, layer()(WHOLE))


def test_a_sample_keeps_its_mask_in_any_micro_batch(samples: list[Tensor]) -> None:
    together = layer()(WHOLE)
    samples[0] = SAMPLES[1:2]
    assert torch.equal(layer()(WHOLE[:, :1]), together[:, 1:2])


def test_padding_does_not_move_a_mask() -> None:
    assert torch.equal(layer()(torch.ones(S + 8, B, F))[:S], layer()(WHOLE))


def test_masks_differ_between_samples_positions_sites_seeds_and_calls_of_other_rank_do_not() -> None:
    out = layer()(WHOLE)
    assert not torch.equal(out[:, 0], out[:, 1])  # numbers that differ above bit 32 only
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out, layer(site=8)(WHOLE))
    assert site_key(1, "a") != site_key(2, "a") != site_key(2, "b")
    assert torch.equal(out, layer()(WHOLE))


def test_rows_and_columns_of_a_mask_are_not_correlated() -> None:
    rows = row_keys(3, torch.arange(64), torch.arange(64))  # [s, b]
    mask = dropped(rows.reshape(-1, 1), torch.arange(512, dtype=torch.int32), 0.5).double() * 2 - 1
    for vectors in (mask, mask.t()):
        together = vectors[:256] @ vectors[:256].t() / vectors.shape[1]
        off = together - torch.diag(together.diag())
        # each is a mean of n signs, of standard deviation 1 / sqrt(n): six of them leave room for 65,000 pairs
        assert off.abs().max().item() < 6 / vectors.shape[1] ** 0.5


def test_mix_is_a_bijection_whose_every_bit_is_even() -> None:
    hashed = mix(torch.arange(2**16, dtype=torch.int32))
    assert len(hashed.unique()) == 2**16
    for bit in range(32):
        assert ((hashed >> bit) & 1).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_gradient_passes_where_the_value_passed() -> None:
    x = torch.randn(S, B, F, requires_grad=True)
    out = layer()(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, layer()(WHOLE))


def test_attention_weights_are_thinned_alike_however_heads_are_cut() -> None:
    weights = torch.ones(B, 4, S, S)
    whole = layer("features").probabilities(weights)
    halves = [layer("features", rank).probabilities(weights[:, :2]) for rank in range(2)]
    assert torch.equal(torch.cat(halves, 1), whole)
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert (whole == 0).float().mean().item() == pytest.approx(P, abs=0.02)


def test_evaluation_and_probability_zero_change_nothing() -> None:
    assert layer().eval()(WHOLE) is WHOLE
    assert layer(p=0.0)(WHOLE) is WHOLE
    assert layer().eval().probabilities(WHOLE) is WHOLE
