"""Every call of torch_npu's fused operators, each behind the documented limits of the operator.

A function here takes the plain implementation of the same thing as `reference`. When an argument is outside the limits
it calls that instead and says so, once for each reason; where the caller has the plain implementation, it returns None.
Letters: b batch, n query heads, g query groups, s sequence, d head dim, h hidden, f width of the gate; in products
joined with a collective n tokens of one rank, t ranks, k and m inputs and outputs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from modellink_lora.device.limits import failed, host, of_all_ranks, product_limits, report

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_HEADS = 256
_MOST_HEAD_DIM = 512
_MOST_TOKENS = 2**20
_LEFT_UP_CAUSAL = 2  # sparse_mode: query i sees keys 0..i, the triangle starts in the upper left corner
_ROTARY_WIDTH = 896  # channels, and the next limit heads or samples, must stay below
_ROTARY_HEADS = 1000
_COMPRESSED = 2048  # side of the one mask that sparse modes 2 and 3 take for any sequence length
# of MC2, the products joined with a collective
_MC2_DTYPES = (torch.float16, torch.bfloat16)
_MC2_RANKS = (2, 4, 8)
_MC2_COLUMNS = range(256, 65535)
_domains: weakref.WeakKeyDictionary[ProcessGroup, str] = weakref.WeakKeyDictionary()  # HCCL's names of them


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, reference: Callable[..., Tensor]) -> Tensor:
    """x [..., h] / rms(x) * weight [h]."""
    reasons = rms_norm_limits(x, weight)
    if reasons:
        report("npu_rms_norm", reasons)
        return reference(x, weight, eps)
    import torch_npu

    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]


def swiglu(x: Tensor, *, reference: Callable[[Tensor], Tensor]) -> Tensor:
    """silu(gate) * up of x = [gate, up], [..., 2 f] -> [..., f]."""
    reasons = swiglu_limits(x)
    if reasons:
        report("npu_swiglu", reasons)
        return reference(x)
    import torch_npu

    return torch_npu.npu_swiglu(x, dim=-1)


def rotary(x: Tensor, angles: Tensor, *, interleaved: bool, reference: Callable[[Tensor], Tensor]) -> Tensor:
    """x [s, b, n, d], whose first channels are turned by `angles` [s, 1, 1, channels]; cosine and sine in x's dtype."""
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    reasons = rotary_limits(turned, angles, interleaved=interleaved)
    if reasons:
        report("npu_rotary_mul", reasons)
        return reference(x)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = _Turn.apply(turned.contiguous(), cos, sin, "interleave" if interleaved else "half")
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class _Turn(torch.autograd.Function):
    """A rotation, whose derivative is the rotation back. The operator's own derivative would keep x for cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
        import torch_npu

        ctx.save_for_backward(cos, sin)
        ctx.mode = mode
        return torch_npu.npu_rotary_mul(x, cos, sin, mode)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        import torch_npu

        cos, sin = ctx.saved_tensors
        return torch_npu.npu_rotary_mul(grad.contiguous(), cos, -sin, ctx.mode), None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    where: Tensor | None = None,
    reference: Callable[..., Tensor],
) -> Tensor:
    """softmax(q k^T * scale) v; q [b, n, s, d], k and v [b, g, l, d] -> [b, n, s, d]; `where` [b, s] as in `Device`."""
    reasons = attention_limits(q, k, v)
    if reasons:
        report("npu_fusion_attention", reasons)
        return reference(q, k, v, causal=causal, scale=scale, where=where)
    import torch_npu

    masking: dict[str, Any] = {}
    if where is not None:
        masking = {"atten_mask": torch.arange(k.shape[2], device=k.device) > where[:, None, :, None]}  # [b, 1, s, l]
    elif causal:
        masking = {"atten_mask": _compressed_mask(q.device), "sparse_mode": _LEFT_UP_CAUSAL}
    q, k, v = (x.contiguous() for x in (q, k, v))  # not all CANN releases take strided inputs
    return torch_npu.npu_fusion_attention(q, k, v, q.shape[1], "BNSD", scale=scale, **masking)[0]


def gather_matmul(x: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor] | None:
    """x [n, k], weight [m, k] -> (P @ weight^T [t n, m], P [t n, k]) with P the gathered x; None outside the limits."""
    reasons = mc2_limits(x, weight, ranks=group.size(), scatter=False) or domain_limits(group)
    if reasons:
        report("npu_all_gather_base_mm", reasons)
        return None
    import torch_npu

    return torch_npu.npu_all_gather_base_mm(x, weight.t(), _domain(group), group.size())


def matmul_scatter(x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor | None:
    """x [t n, k], weight [m, k] -> rows [n, m] of the sum over ranks of x @ weight^T; None outside the limits."""
    reasons = mc2_limits(x, weight, ranks=group.size(), scatter=True) or domain_limits(group)
    if reasons:
        report("npu_mm_reduce_scatter_base", reasons)
        return None
    import torch_npu

    return torch_npu.npu_mm_reduce_scatter_base(x, weight.t(), _domain(group), group.size(), reduce_op="sum")


def rms_norm_limits(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    """What keeps npu_rms_norm from taking these arguments; empty if nothing."""
    return failed(
        (x.device.type == "npu", f"input is on {x.device.type}"),
        (x.dtype in _DTYPES, f"dtype {x.dtype}"),
        (weight.dtype == x.dtype, f"weight is {weight.dtype}, input {x.dtype}"),
        (weight.shape == x.shape[-1:], f"weight {tuple(weight.shape)} is not the last dimension of {tuple(x.shape)}"),
        (x.numel() > 0, "input is empty"),
    )


def swiglu_limits(x: Tensor) -> tuple[str, ...]:
    """What keeps npu_swiglu from taking this; empty if nothing."""
    return failed(
        (x.device.type == "npu", f"input is on {x.device.type}"),
        (x.dtype in _DTYPES, f"dtype {x.dtype}"),
        (1 <= x.dim() <= 8, f"{x.dim()} dimensions"),
        (x.shape[-1:].numel() % 2 == 0, f"last dimension {x.shape[-1:].numel()} is odd"),
        (x.is_contiguous(), "input is a strided view"),
        (x.numel() > 0, "input is empty"),
        (x.device.type != "npu" or _since_atlas_a2(), "the chip is older than Atlas A2"),
    )


def rotary_limits(x: Tensor, angles: Tensor, *, interleaved: bool) -> tuple[str, ...]:
    """What keeps npu_rotary_mul from turning x [s, b, n, channels] by angles [s, 1, 1, channels]; empty if nothing."""
    if x.dim() != 4 or angles.shape != (x.shape[0], 1, 1, x.shape[-1]):
        return (f"angles {tuple(angles.shape)} for {tuple(x.shape)}",)
    _, b, n, channels = x.shape
    return failed(
        (x.device.type == "npu", f"input is on {x.device.type}"),
        (x.dtype in _DTYPES, f"dtype {x.dtype}"),
        (channels < _ROTARY_WIDTH and channels % 2 == 0, f"{channels} channels, even and below {_ROTARY_WIDTH} needed"),
        # the documented limit is one of each in one order of channels, and of their product in the other
        ((b * n if interleaved else max(b, n)) < _ROTARY_HEADS, f"{b} samples of {n} heads, below {_ROTARY_HEADS}"),
        (x.numel() > 0, "input is empty"),
        (x.device.type != "npu" or _since_atlas_a2(), "the chip is older than Atlas A2"),
    )


def attention_limits(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
    """What keeps npu_fusion_attention from taking these arguments; empty if nothing."""
    heads, groups, tokens = q.shape[1], k.shape[1], max(q.shape[2], k.shape[2])
    return failed(
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


def mc2_limits(x: Tensor, weight: Tensor, *, ranks: int, scatter: bool) -> tuple[str, ...]:
    """What keeps MC2 from x [n, k] @ weight [m, k]^T with a gather before or a scatter after; empty if nothing."""
    k = x.shape[-1]
    return product_limits(x, weight, device_type="npu", dtypes=_MC2_DTYPES, parts=ranks if scatter else 1) + failed(
        (k in _MC2_COLUMNS, f"k is {k}, outside [{_MC2_COLUMNS.start}, {_MC2_COLUMNS.stop})"),
        (ranks in _MC2_RANKS, f"{ranks} ranks, not one of {', '.join(map(str, _MC2_RANKS))}"),
        (weight.is_contiguous() or weight.mT.is_contiguous(), "weight is a part of wider rows"),
        (x.device.type != "npu" or _since_atlas_a2(), "the chip is older than Atlas A2"),
    )


def domain_limits(group: ProcessGroup) -> tuple[str, ...]:
    """What keeps MC2 from this group; empty if nothing. That its NPUs are linked each to each cannot be asked for."""
    return failed(
        (all(other is group for other in _domains), "a model's MC2 operators share one group, and another has them"),
        (len(set(of_all_ranks(group, host))) == 1, "the group's ranks are on several hosts"),
    )


def _domain(group: ProcessGroup) -> str:
    """HCCL's name of the group. Asking for it the first time sets the communicator up, on all ranks together."""
    if group not in _domains:
        backend = group._get_backend(torch.device("npu"))
        _domains[group] = backend.get_hccl_comm_name(dist.get_rank())  # type: ignore[attr-defined]  # the global rank
    return _domains[group]


@functools.cache
def _since_atlas_a2() -> bool:
    """The operator exists from Atlas A2 on, the generation that also brought bfloat16."""
    return bool(torch.npu.is_bf16_supported())  # type: ignore[attr-defined]


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """[2048, 2048], True above the diagonal: what is True is hidden. 4 MiB, made once for a device."""
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)
