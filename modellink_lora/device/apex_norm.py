"""apex's fused RMSNorm, taken only where it gives what ours gives: both run once on the device before anything else.

It rounds as ours does, to x's dtype before the weight. Transformer Engine's and PyTorch's own fused kernels round once,
after the weight; with 16 bits about a quarter of all elements then come out a unit apart, so they are not taken.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from modellink_lora.device.elementwise import RmsNorm

Norm = Callable[[Tensor, Tensor, float], Tensor]  # x [..., h], weight [h], eps

_ROWS, _WIDTH, _EPS = 64, 1024, 1e-5
# Sums in another order move a number over the middle between two neighbours now and then. Of elements.
_NOW_AND_THEN = 0.02


def apex_rms_norm(device: torch.device) -> tuple[Norm | None, str]:
    """The function, or None, and what computes the norm in words."""
    if importlib.util.find_spec("apex") is None:
        return None, "PyTorch (no apex)"
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            result: Tensor = fused_rms_norm_affine(x, weight, tuple(weight.shape), eps)
            return result

        different = [str(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)
                     if differs(norm, dtype, device)]  # fmt: skip
    except Exception as error:  # an apex built for another torch fails in ways of its own
        return None, f"PyTorch (apex fails: {type(error).__name__}: {' '.join(str(error).split())[:80]})"
    if different:
        return None, f"PyTorch (apex computes another norm in {', '.join(different)})"
    return norm, "apex"


def differs(norm: Norm, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether outputs or input gradients are further from ours than another order of sums explains."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _WIDTH, generator=generator).to(device, dtype)
    weight = (torch.rand(_WIDTH, generator=generator) + 0.5).to(device, dtype)
    grad = torch.randn(_ROWS, _WIDTH, generator=generator).to(device, dtype)
    found = []
    for function in (norm, RmsNorm.apply):
        inner = x.clone().requires_grad_()
        output = function(inner, weight, _EPS)
        output.backward(grad)
        assert inner.grad is not None
        found.append((output.detach().float(), inner.grad.float()))
    (output, dx), (ours, our_dx) = found
    unit = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    if not ((output - ours).abs() <= unit * ours.abs().clamp(min=unit)).all():
        return True
    if dtype != torch.float32 and (output != ours).float().mean() > _NOW_AND_THEN:
        return True
    return not bool((dx - our_dx).abs().max() <= 2 * unit * our_dx.abs().max())
