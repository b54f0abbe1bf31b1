"""The r-wide operations in plain PyTorch against textbook expressions in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modellink_lora.device import CpuDevice, CudaDevice, lora_ops
from modellink_lora.device.lora_ops import LoraOps, Mask
from modellink_lora.device.lora_triton import TritonLoraOps

OPS = CpuDevice().lora_ops
SHAPES = [(37, 70, 3), (64, 99, 8), (151, 259, 16), (33, 130, 64)]  # n, i, r
WORST = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
every_case = pytest.mark.parametrize("dtype", WORST, ids=str)
every_shape = pytest.mark.parametrize("n, i, r", SHAPES)
every_p = pytest.mark.parametrize("p", [0.0, 0.1])


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests' matrices are small: with blocks of a few lines, several and a shorter last one occur."""
    monkeypatch.setattr(lora_ops, "_CPU_BLOCK", 800)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows lie further apart than they are wide."""
    wider = torch.randn(shape[0], shape[1] + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wider.to(dtype)[:, : shape[1]]


def mask_of(n: int, i: int, p: float) -> Mask | None:
    rows = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(9)).to(torch.int32)
    return Mask(rows, torch.arange(40, 40 + i, dtype=torch.int32), p) if p else None


def keep(x: Tensor, mask: Mask | None) -> Tensor:
    return x if mask is None else torch.where(mask.dropped(), 0, x)


def error(value: Tensor, truth: Tensor) -> float:
    """Relative to the truth, of the worst row: a lost row is an error of 1."""
    assert value.shape == truth.shape
    return ((value.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)).max().item()


@every_case
@every_shape
@every_p
def test_the_products_are_those_of_fp64(n: int, i: int, r: int, p: float, dtype: torch.dtype) -> None:
    x, A = drawn(n, i, dtype=dtype, seed=1), drawn(r, i, dtype=dtype, seed=2)
    U, B = drawn(n, r, dtype=dtype, seed=3), drawn(i, r, dtype=dtype, seed=4)
    mask, worst = mask_of(n, i, p), WORST[dtype]
    X, a, u, b = (t.double() for t in (x, A, U, B))
    low, dA, (dS, dB) = OPS.down(x, A, mask, 0.6), OPS.down_gradient(U, x, mask, 0.7), OPS.up_gradients(x, B, U)
    assert {t.dtype for t in (low, dA, dS, dB)} == {dtype}
    assert error(low, 0.6 * keep(X, mask) @ a.t()) < worst
    assert error(dA, 0.7 * u.t() @ keep(X, mask)) < worst
    assert error(dS, X @ b) < worst
    assert error(dB, X.t() @ u) < worst
    dx = x.clone()
    expected = X + 0.37 * keep(u @ a, mask)
    OPS.add_input_gradient(dx, U, A, 0.37, mask)
    assert error(dx, expected) < worst


def test_the_gradient_is_added_to_a_view_and_nothing_beside_it_changes() -> None:
    wide = torch.randn(20, 50)
    before = wide.clone()
    OPS.add_input_gradient(wide[:, :40], torch.randn(20, 4), torch.randn(4, 40), 1.0, mask_of(20, 40, 0.1))
    assert torch.equal(wide[:, 40:], before[:, 40:]) and not torch.equal(wide[:, :40], before[:, :40])


def test_dropped_elements_may_be_anything() -> None:
    mask = mask_of(16, 32, 0.5)
    assert mask is not None
    x, A = torch.randn(16, 32), torch.randn(4, 32)
    spoiled = x.masked_fill(mask.dropped(), float("nan"))
    assert torch.equal(OPS.down(spoiled, A, mask), OPS.down(x, A, mask))
    assert torch.equal(OPS.down_gradient(x[:, :4], spoiled, mask), OPS.down_gradient(x[:, :4], x, mask))
    assert torch.equal(spoiled.isnan(), mask.dropped())  # the input itself stays


@every_p
def test_an_adapter_wider_than_its_base_keeps_its_dtype(p: float) -> None:
    x, A = drawn(20, 48, dtype=torch.bfloat16, seed=1), drawn(4, 48, dtype=torch.float32, seed=2)
    U, B, mask = (
        drawn(20, 4, dtype=torch.float32, seed=3),
        drawn(48, 4, dtype=torch.float32, seed=4),
        mask_of(20, 48, p),
    )
    X = x.double()
    assert error(OPS.down(x, A, mask), keep(X, mask) @ A.double().t()) < 1e-6
    assert error(OPS.down_gradient(U, x, mask), U.double().t() @ keep(X, mask)) < 1e-6
    dS, dB = OPS.up_gradients(x, B, U)
    assert error(dS, X @ B.double()) < 1e-6 and error(dB, X.t() @ U.double()) < 1e-6
    dx = x.clone()
    OPS.add_input_gradient(dx, U, A, 0.5, mask)
    assert error(dx, X + 0.5 * keep(U.double() @ A.double(), mask)) < WORST[torch.bfloat16]


def test_a_mask_is_cut_like_its_matrix() -> None:
    mask = mask_of(30, 40, 0.3)
    assert mask is not None
    assert torch.equal(mask.part(slice(7, 14), slice(33, 77)).dropped(), mask.dropped()[7:14, 33:77])


def test_a_gpu_uses_library_products_unless_told_otherwise() -> None:
    device = CudaDevice()
    assert type(device.lora_ops) is LoraOps
    device.triton_lora = True
    assert type(device.lora_ops) is TritonLoraOps
    assert type(CudaDevice().lora_ops) is LoraOps
