"""The hash of dropout masks: the same bits from every implementation, and those of MurmurHash3's finalizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modellink_lora.device import hashing
from modellink_lora.device.hashing import dropped, mix, threshold


def in_integers(x: int) -> int:
    """The finalizer in Python's integers, unsigned."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def keys(n: int) -> Tensor:
    numbers = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(1))
    return numbers.to(torch.int32)


def test_mix_is_the_finalizer_of_murmurhash3() -> None:
    x = torch.cat([keys(64), torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)])
    assert mix(x).tolist() == [signed(in_integers(value % 2**32)) for value in x.tolist()]


@pytest.mark.parametrize("n, i", [(1, 1), (7, 1000), (130, 517), (3, 70_000)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_made_in_blocks_is_the_elementwise_one(n: int, i: int, p: float) -> None:
    rows, columns = keys(n)[:, None], torch.arange(5, 5 + i, dtype=torch.int32)
    assert torch.equal(dropped(rows, columns, p), mix(rows ^ mix(columns)) < threshold(p))


def test_the_mask_of_a_batch_is_that_of_its_rows() -> None:
    rows, columns = keys(24), torch.arange(50, dtype=torch.int32)
    flat = dropped(rows[:, None], columns, 0.3)
    assert torch.equal(dropped(rows.view(6, 4).t()[..., None], columns, 0.3), flat.view(6, 4, 50).transpose(0, 1))
    assert torch.equal(dropped(rows[:, None], columns[:, None].t(), 0.3), flat)  # a shape outside of the fast path


def test_the_fast_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(hashing, "_dropped_numpy", lambda *args: calls.append(args))
    dropped(keys(3)[:, None], torch.arange(4, dtype=torch.int32), 0.5)
    assert len(calls) == 1
