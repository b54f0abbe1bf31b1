"""What the CUDA device decides without a GPU: which heads are repeated, and which norm is taken."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from modellink_lora.device import cuda
from modellink_lora.device.apex_norm import apex_rms_norm
from modellink_lora.device.cpu import CpuDevice
from modellink_lora.device.cuda import CudaDevice

CPU = torch.device("cpu")


def heads() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)


@pytest.mark.parametrize("where", [None, torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])])
def test_attention_is_that_of_other_devices(where: torch.Tensor | None) -> None:
    q, k, v = heads()
    settings: dict[str, Any] = {"causal": True, "scale": 0.3, "where": where}
    torch.testing.assert_close(CudaDevice().attention(q, k, v, **settings), CpuDevice().attention(q, k, v, **settings))


@pytest.mark.parametrize(
    ("shared", "masked", "expected"), [(True, False, 2), (True, True, 4), (False, False, 4)],
    ids=["a kernel shares", "a mask", "none shares"],
)  # fmt: skip
def test_keys_are_repeated_only_where_no_fused_kernel_shares_them(
    shared: bool, masked: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(cuda, "shares_keys", lambda q, k, v, causal: shared)
    monkeypatch.setattr(cuda.Device, "attention", lambda self, q, k, v, **_: seen.append((k.shape[1], v.shape[1])) or q)
    CudaDevice().attention(*heads(), causal=True, scale=1.0, where=torch.zeros(2, 5) if masked else None)
    assert seen == [(expected, expected)]


def test_torch_answers_for_its_kernels() -> None:
    q, k, v = heads()
    assert cuda.shares_keys(q, k, v, causal=True) is False, "these tensors are not on a GPU"
    assert cuda.attention_kernels()


def fake_apex(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.fused_rms_norm_affine = function  # type: ignore[attr-defined]
    for name in ("apex", "apex.normalization"):
        package = types.ModuleType(name)
        package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def as_apex(x: torch.Tensor, weight: torch.Tensor, shape: tuple[int, ...], eps: float) -> torch.Tensor:
    """Autograd's own, with the sum of squares in another order."""
    squares = x.float().square().unflatten(-1, (-1, 8)).sum(-2).sum(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(squares / shape[0] + eps)).to(x.dtype)


def rounded_once(x: torch.Tensor, weight: torch.Tensor, shape: tuple[int, ...], eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), shape, weight.float(), eps).to(x.dtype)


def test_a_fused_norm_with_our_roundings_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apex(monkeypatch, as_apex)
    norm, words = apex_rms_norm(CPU)
    assert norm is not None and words == "apex"
    device = CudaDevice()
    device.fused_norm = norm
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.rand(16).bfloat16()
    torch.testing.assert_close(device.rms_norm(x, weight, 1e-5), CpuDevice().rms_norm(x, weight, 1e-5))
    for_gemma = device.rms_norm(x, weight, 1e-5, one_more=True)
    assert torch.equal(for_gemma, CpuDevice().rms_norm(x, weight, 1e-5, one_more=True)), "apex has no 1 + weight"


def test_a_fused_norm_that_rounds_otherwise_or_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apex(monkeypatch, rounded_once)
    assert apex_rms_norm(CPU) == (
        None, "PyTorch (apex computes another norm in torch.bfloat16, torch.float16)"
    )  # fmt: skip

    def broken(*_: Any) -> torch.Tensor:
        raise ImportError("undefined symbol:\n _ZN3c10")

    fake_apex(monkeypatch, broken)
    assert apex_rms_norm(CPU) == (None, "PyTorch (apex fails: ImportError: undefined symbol: _ZN3c10)")


def test_without_apex_the_norm_is_ours() -> None:
    assert apex_rms_norm(CPU) == (None, "PyTorch (no apex)")
