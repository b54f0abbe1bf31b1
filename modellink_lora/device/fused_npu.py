"""Every call of torch_npu's fused operators, each behind the documented limits of the operator.

A function here takes the plain implementation of the same thing as `reference`. When an argument is outside the limits
it calls that instead and says so, once for each reason. Letters: b batch, n query heads, g query groups, s sequence,
d head dim, h hidden.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_HEADS = 256
_MOST_HEAD_DIM = 512
_MOST_TOKENS = 2**20
_LEFT_UP_CAUSAL = 2  # sparse_mode: query i sees keys 0..i, the triangle starts in the upper left corner
_COMPRESSED = 2048  # side of the one mask that sparse modes 2 and 3 take for any sequence length


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, reference: Callable[..., Tensor]) -> Tensor:
    """x [..., h] / rms(x) * weight [h]."""
    reasons = rms_norm_limits(x, weight)
    if reasons:
        _report("npu_rms_norm", reasons)
        return reference(x, weight, eps)
    import torch_npu

    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, reference: Callable[..., Tensor]
) -> Tensor:
    """softmax(q k^T * scale) v; q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]."""
    reasons = attention_limits(q, k, v)
    if reasons:
        _report("npu_fusion_attention", reasons)
        return reference(q, k, v, causal=causal, scale=scale)
    import torch_npu

    masking = {"atten_mask": _compressed_mask(q.device), "sparse_mode": _LEFT_UP_CAUSAL} if causal else {}
    q, k, v = (x.contiguous() for x in (q, k, v))  # not all CANN releases take strided inputs
    return torch_npu.npu_fusion_attention(q, k, v, q.shape[1], "BNSD", scale=scale, **masking)[0]


def rms_norm_limits(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    """What keeps npu_rms_norm from taking these arguments; empty if nothing."""
    return _failed(
        (x.device.type == "npu", f"input is on {x.device.type}"),
        (x.dtype in _DTYPES, f"dtype {x.dtype}"),
        (weight.dtype == x.dtype, f"weight is {weight.dtype}, input {x.dtype}"),
        (weight.shape == x.shape[-1:], f"weight {tuple(weight.shape)} is not the last dimension of {tuple(x.shape)}"),
        (x.numel() > 0, "input is empty"),
    )


def attention_limits(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
    """What keeps npu_fusion_attention from taking these arguments; empty if nothing."""
    heads, groups, tokens = q.shape[1], k.shape[1], max(q.shape[2], k.shape[2])
    return _failed(
        (q.device.type == "npu", f"input is on {q.device.type}"),
        (q.dtype in _DTYPES, f"dtype {q.dtype}"),
        (q.dtype == k.dtype == v.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"),
        (k.shape == v.shape, f"k {tuple(k.shape)} and v {tuple(v.shape)} differ"),
        (q.shape[0] == k.shape[0], f"batch {q.shape[0]} of q, {k.shape[0]} of k"),
        (q.shape[3] == k.shape[3] <= _MOST_HEAD_DIM, f"head dim {q.shape[3]} of q, {k.shape[3]} of k"),
        (heads <= _MOST_HEADS, f"{heads} heads, at most {_MOST_HEADS}"),
        (groups > 0 and heads % groups == 0, f"{heads} heads in {groups} groups"),
        (0 < tokens <= _MOST_TOKENS and q.numel() > 0, f"{tokens} tokens"),
        (q.device.type != "npu" or _since_atlas_a2(), "the chip is older than Atlas A2"),
    )


def _failed(*checks: tuple[bool, str]) -> tuple[str, ...]:
    return tuple(reason for passed, reason in checks if not passed)


@functools.cache
def _since_atlas_a2() -> bool:
    """The operator exists from Atlas A2 on, the generation that also brought bfloat16."""
    return bool(torch.npu.is_bf16_supported())  # type: ignore[attr-defined]


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """[2048, 2048], True above the diagonal: what is True is hidden. 4 MiB, made once for a device."""
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)


@functools.cache
def _report(operator: str, reasons: tuple[str, ...]) -> None:
    """Once for each operator and reasons: a slower path must not be taken in silence."""
    logging.getLogger(__name__).warning("%s is replaced by plain PyTorch: %s", operator, "; ".join(reasons))
