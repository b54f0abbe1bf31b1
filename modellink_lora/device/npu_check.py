"""Whether this machine's fused NPU operators compute what plain PyTorch computes; run at every start on small tensors.

A release of CANN that lacks an operator, or one that computes something else, then costs speed and not the run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modellink_lora.device import fused_npu
from modellink_lora.device.base import softmax_attention

_TOLERANCE = 0.05  # of the largest value: 16 bits round to less than 0.01 here, another meaning is off by far more


def unfit(device: torch.device) -> dict[str, str]:
    """Fused operator -> what is wrong with it on this device; empty if nothing."""
    reasons = {}
    for name, (fused, plain, inputs) in _cases(device).items():
        try:
            worst = max(_differences(fused, plain, inputs, device))
        except RuntimeError as error:  # what torch_npu raises for all that CANN refuses
            reasons[name] = f"fails here ({(str(error).strip().splitlines() or ['no message'])[0]})"
            continue
        if not worst <= _TOLERANCE:  # NaN is no number
            reasons[name] = f"differs from plain PyTorch by {worst:.0%} of the largest value"
    return reasons


def _cases(device: torch.device) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """Operator -> function with it, the same in plain PyTorch, fp32 inputs. Sizes of a small attention head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def refused(*_: object, **__: object) -> Tensor:
        raise RuntimeError("outside the limits of the operator")

    angles = random(32, 1, 1, 32).repeat(1, 1, 1, 2)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    return {
        "npu_rms_norm": (
            lambda x, w: fused_npu.rms_norm(x, w, 1e-5, reference=refused),
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
            [random(32, 2, 128), random(128)],
        ),
        "npu_swiglu": (
            lambda x: fused_npu.swiglu(x, reference=refused),
            lambda x: F.silu(x[..., :64]) * x[..., 64:],
            [random(32, 2, 128)],
        ),
        "npu_rotary_mul": (
            lambda x: fused_npu.rotary(x, angles.to(device), interleaved=False, reference=refused),
            turned,
            [random(32, 2, 4, 64)],
        ),
        "npu_fusion_attention": (
            lambda q, k, v: fused_npu.attention(q, k, v, causal=True, scale=0.125, reference=refused),
            lambda q, k, v: softmax_attention(q, k, v, causal=True, scale=0.125),
            [random(2, 4, 32, 64), random(2, 2, 32, 64), random(2, 2, 32, 64)],
        ),
    }  # fmt: skip


def _differences(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], device: torch.device
) -> list[float]:
    """Of the output and every gradient, relative to the largest value: fused in 16 bits, plain in fp32 on the CPU."""
    dtype = torch.bfloat16 if torch.npu.is_bf16_supported() else torch.float16  # type: ignore[attr-defined]
    rounded = [x.to(dtype) for x in inputs]
    with torch.enable_grad():
        ours = [x.to(device).requires_grad_() for x in rounded]
        theirs = [x.float().requires_grad_() for x in rounded]
        out, expected = fused(*ours), plain(*theirs)
        grads = torch.autograd.grad(out, ours, torch.ones_like(out))
        wanted = torch.autograd.grad(expected, theirs, torch.ones_like(expected))
    pairs = zip((out.detach(), *grads), (expected.detach(), *wanted), strict=True)
    return [float((a.cpu().float() - b).abs().max() / b.abs().max()) for a, b in pairs]
