"""RMSNorm and SwiGLU in plain PyTorch as autograd functions that keep their input and no intermediate result.

Letters: h width of the norm, f width of the gate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight; keeps x and 1 / rms, one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_more: bool = False) -> Tensor:
        """x [..., h], weight [h]; statistics in fp32 (fp64 for fp64), rounded to x's dtype before the weight.

        With `one_more` the factor is 1 + weight and the product is rounded once.
        """
        wide = x.to(_wide(x.dtype))
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        ctx.one_more = one_more
        if one_more:
            return (wide * inverse * (1 + weight.to(wide.dtype))).to(x.dtype)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """With n = x / rms: dx = (g - n mean(g n)) / rms where g = dy weight. Rounded once."""
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse  # in the dtype of `inverse`, and so is what follows
        for_weight = None
        if ctx.needs_input_grad[1]:
            product = grad * normed.to(x.dtype).to(normed.dtype)
            for_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None, None
        scaled = grad * (weight.to(normed.dtype) + int(ctx.one_more))
        along = (scaled * normed).mean(-1, keepdim=True)  # [..., 1]
        return scaled.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), for_weight, None, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up of x = [gate, up]; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """[..., 2 f] -> [..., f]"""
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The operators and roundings of autograd's own, written into one result."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        result = torch.empty_like(x)
        for_gate, for_up = result.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=for_gate)
        return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
