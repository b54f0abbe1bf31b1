"""What torch_npu's fused operators mean, written from their documentation in plain PyTorch on CPU tensors.

`KERNELS` maps the operator's name to a function with the operator's own arguments. Computation is in fp32 and is
rounded once. Derivatives are separate operators, which torch_npu's autograd calls.

Letters: b batch, n query heads, g key heads, s sequence, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.npu_sim.simulator import draw_seed, host_generator

_COMPRESSED_MASK = (2048, 2048)
_MASKED = torch.finfo(torch.float32).min
# A ScalarType argument arrives as its number in c10/core/ScalarType.h.
_DTYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip


# ---- rms norm


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """-> y and 1/rms in fp32; the norm is over the dimensions of gamma, the last ones of x."""
    assert x.shape[x.dim() - gamma.dim() :] == gamma.shape, f"gamma {gamma.shape} does not end x {x.shape}"
    over = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(over, keepdim=True) + epsilon)
    return (wide * inverse * gamma.float()).to(x.dtype), inverse


def rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    over = tuple(range(-gamma.dim(), 0))
    normed, scaled = x.float() * inverse, grad.float() * gamma.float()
    for_x = inverse * (scaled - normed * (scaled * normed).mean(over, keepdim=True))
    for_gamma = (grad.float() * normed).sum_to_size(gamma.shape)
    return for_x.to(x.dtype), for_gamma


# ---- swiglu


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half."""
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.float().chunk(2, dim)
    sigmoid, grad = gate.sigmoid(), grad.float()
    for_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([for_gate, grad * gate * sigmoid], dim).to(x.dtype)


# ---- rotary embedding


def _rotated(x: Tensor, mode: str) -> Tensor:
    """A quarter turn of each pair: (a, b) -> (-b, a). The pair is (i, i + d/2) or, interleaved, (2i, 2i + 1)."""
    if mode == "interleave":
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    assert rotate is None, "npu_rotary_mul with a rotation matrix is not simulated"
    return x * cos + _rotated(x, rotary_mode) * sin


def rotary_mul_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    for_x = grad * cos - _rotated(grad * sin, rotary_mode)  # the turn back is the negative of the turn
    for_cos, for_sin = grad * x, grad * _rotated(x, rotary_mode)
    return for_x, for_cos.sum_to_size(cos.shape), for_sin.sum_to_size(sin.shape)


# ---- attention


def _to_heads(x: Tensor, heads: int, layout: str) -> Tensor:
    """-> [b, heads, s, d] in fp32."""
    if layout == "SBH":
        x = x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    elif layout == "BSH":
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    elif layout == "BSND":
        x = x.transpose(1, 2)
    else:
        assert layout == "BNSD", f"input_layout {layout} is not simulated"
    return x.float()


def _from_heads(x: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "SBH":
        x = x.permute(2, 0, 1, 3).flatten(2)
    elif layout == "BSH":
        x = x.transpose(1, 2).flatten(2)
    elif layout == "BSND":
        x = x.transpose(1, 2)
    return x.to(dtype)


def _key_heads(q: Tensor, k: Tensor, heads: int, layout: str) -> int:
    if layout in ("SBH", "BSH"):
        return k.shape[-1] // (q.shape[-1] // heads)
    return k.shape[1] if layout == "BNSD" else k.shape[2]


def _masked(scores: Tensor, mask: Tensor | None, sparse_mode: int) -> Tensor:
    """1 in the mask hides. Modes: 0 the mask as given, 2 causal from the upper left, 3 from the lower right."""
    rows, columns = scores.shape[-2:]
    if sparse_mode in (2, 3):
        assert mask is not None and tuple(mask.shape[-2:]) == _COMPRESSED_MASK, "modes 2 and 3 need the 2048x2048 mask"
        assert torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1)), "mask is not upper triangular"
        first_hidden = 1 if sparse_mode == 2 else 1 + columns - rows
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(first_hidden)
    elif mask is None:
        return scores
    else:
        assert sparse_mode == 0, f"sparse_mode {sparse_mode} is not simulated"
        assert mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, not bool or uint8"
        assert mask.shape[-2:] == (rows, columns), f"atten_mask {tuple(mask.shape)} for scores {tuple(scores.shape)}"
        hidden = mask.bool()
    return scores.masked_fill(hidden, _MASKED)


def _dropout_factor(shape: torch.Size, keep_prob: float, seed: int, offset: int) -> Tensor | float:
    if keep_prob >= 1:
        return 1.0
    kept = torch.rand(shape, generator=host_generator(seed, offset)) < keep_prob
    return kept.float() / keep_prob


def _probabilities(
    q: Tensor, k: Tensor, heads: int, layout: str, mask: Tensor | None, scale: float, sparse_mode: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> softmax [b, n, sq, sk], its row maximum and row sum [b, n, sq, 1]."""
    groups = _key_heads(q, k, heads, layout)
    wide_q = _to_heads(q, heads, layout)
    wide_k = _to_heads(k, groups, layout).repeat_interleave(heads // groups, 1)
    scores = _masked(wide_q @ wide_k.mT * scale, mask, sparse_mode)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total, top, total


def fusion_attention(
    q: Tensor, k: Tensor, v: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = 2147483647, next_tockens: int = 2147483647, inner_precise: int = 0, prefix: Any = None,
    actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None, sparse_mode: int = 0, **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:  # fmt: skip
    """-> output, softmax maximum and sum repeated 8 times, nothing, seed, offset, elements of the dropout mask."""
    assert pse is None and padding_mask is None and prefix is None and actual_seq_qlen is None, "not simulated"
    p, top, total = _probabilities(q, k, head_num, input_layout, atten_mask, scale, sparse_mode)
    seed, offset = draw_seed() if keep_prob < 1 else (0, 0)
    groups = _key_heads(q, k, head_num, input_layout)
    wide_v = _to_heads(v, groups, input_layout).repeat_interleave(head_num // groups, 1)
    out = (p * _dropout_factor(p.shape, keep_prob, seed, offset)) @ wide_v
    eight = (*top.shape[:-1], 8)
    nothing = torch.empty(0, dtype=q.dtype)
    out = _from_heads(out, input_layout, q.dtype)
    return out, top.expand(eight), total.expand(eight), nothing, seed, offset, p.numel() if keep_prob < 1 else 0


def fusion_attention_grad(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, head_num: int, input_layout: str, *,
    atten_mask: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0, sparse_mode: int = 0,
    seed: int = 0, offset: int = 0, **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, k, v and two that are not used. Softmax is computed again, dropout from seed and offset."""
    p, _top, _total = _probabilities(q, k, head_num, input_layout, atten_mask, scale_value, sparse_mode)
    groups = _key_heads(q, k, head_num, input_layout)
    repeat = head_num // groups
    wide_q = _to_heads(q, head_num, input_layout)
    wide_k, wide_v = (_to_heads(x, groups, input_layout).repeat_interleave(repeat, 1) for x in (k, v))
    wide_grad = _to_heads(grad, head_num, input_layout)
    factor = _dropout_factor(p.shape, keep_prob, seed, offset)
    for_p = (wide_grad @ wide_v.mT) * factor
    for_scores = p * (for_p - (for_p * p).sum(-1, keepdim=True)) * scale_value
    for_q = for_scores @ wide_k
    for_k, for_v = for_scores.mT @ wide_q, (p * factor).mT @ wide_grad
    for_k, for_v = (x.unflatten(1, (groups, repeat)).sum(2) for x in (for_k, for_v))
    nothing = torch.empty(0, dtype=q.dtype)
    for_q, for_k, for_v = (_from_heads(x, input_layout, q.dtype) for x in (for_q, for_k, for_v))
    return for_q, for_k, for_v, nothing, nothing


# ---- small ones


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    kept = torch.rand(x.shape, generator=host_generator(*draw_seed())) >= p
    return x * kept.to(x.dtype) / (1 - p), kept.to(torch.uint8)


def dropout_backward(grad: Tensor, kept: Tensor, p: float) -> Tensor:
    return grad * kept.to(grad.dtype) / (1 - p)


def dtype_cast(x: Tensor, dtype: torch.dtype | int, *_: Any, **__: Any) -> Tensor:
    return x.to(_DTYPES[dtype] if isinstance(dtype, int) else dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "_npu_dropout": dropout,
    "npu_dropout_backward": dropout_backward,
    "npu_dtype_cast": dtype_cast,
    "npu_dtype_cast_backward": dtype_cast,
}
