"""The device's own operators against formulas in fp64 on the CPU: which ran, and how far apart the results are.

Inputs are random, rounded to the dtype under test and then the same for both. Letters: b batch, n query heads, g query
groups, s sequence, d head dim; in products n tokens, i inputs, o outputs, r rank, t ranks, k and m inputs and outputs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from modellink_lora.device import Device
from modellink_lora.device.base import softmax_attention
from modellink_lora.device.lora_ops import Mask
from modellink_lora.diagnosis.finding import Finding

TOPIC = "operators"
# Of the worst row. A rounding is 6e-8, 5e-4, 4e-3; sums of hundreds of rounded products
# and gradients through them come to a few of them, a wrong operator to 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_EPS = 1e-5
_FUSED = ("attention", "fused", "rms_norm", "swiglu", "_linear_pointwise")  # in names of PyTorch's own operators

Tensors = Sequence[Tensor]
# Of a device: (what the device computes, what is right)
Check = Callable[[Device, torch.device, torch.dtype], tuple[Tensors, Tensors]]


def operator_findings(device: Device, here: torch.device, group: ProcessGroup | None) -> list[Finding]:
    """One line for each operation and dtype that the device has.

    Args:
        group: of the ranks that check products joined with collectives together; None leaves those out.
    """
    result = [
        Finding(
            TOPIC, name, f"not used: {why}", "warning", "plain PyTorch computes it, more slowly; try other releases"
        )
        for name, why in device.plain.items()
    ]
    checks: dict[str, Check] = dict(CHECKS)
    if group is not None and group.size() > 1:
        checks |= {"gather_matmul": _gather_matmul(group), "matmul_scatter": _matmul_scatter(group)}
    for name, check in checks.items():
        for dtype in TOLERANCE:
            if device.supports(dtype) and not (dtype == torch.float16 and device.name == "cpu"):  # slow, and not used
                result.append(_finding(name, check, device, here, dtype))
    return result


def error_of(found: Tensors, expected: Tensors) -> float:
    """The largest distance of a row from what it should be, relative to it, or to a usual row if that is longer."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape, f"shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        rows = [x.detach().cpu().double().reshape(-1, x.shape[-1]) for x in (one, other)]
        lengths = rows[1].norm(dim=1)
        distances = (rows[0] - rows[1]).norm(dim=1) / lengths.clamp(min=float(lengths.square().mean().sqrt()))
        worst = max(worst, float(distances.nan_to_num(torch.inf).max()))
    return worst


def _finding(name: str, check: Check, device: Device, here: torch.device, dtype: torch.dtype) -> Finding:
    what = f"{name} {str(dtype).removeprefix('torch.')}"
    torch.manual_seed(1)
    advice = "do not train with it: report the versions above to the operator's maker, and try other releases of them"
    with _reasons() as reasons, _Names() as names:
        try:
            found, expected = check(device, here, dtype)
        except NotImplementedError:
            return Finding(TOPIC, what, "plain PyTorch: " + ("; ".join(reasons) or "no such operator on this device"))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Finding(TOPIC, what, f"fails: {line}", "problem", advice)
    distance, limit = error_of(found, expected), TOLERANCE[dtype]
    text = f"{names.fused() or 'plain PyTorch'}, error {distance:.1e} of {limit:.0e}"
    if not distance <= limit:
        return Finding(TOPIC, what, f"WRONG: {text}", "problem", advice)
    if reasons:
        return Finding(TOPIC, what, text, "warning", f"slower than it could be: {'; '.join(reasons)}")
    return Finding(TOPIC, what, text)


class _Names(TorchDispatchMode):
    """Collects the names of the operators that really run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):  # the formulas' own
            self.seen.append(f"{func.namespace}::{func._schema.name.split('::')[1]}")
        return func(*args, **(kwargs or {}))

    def fused(self) -> str:
        """The operators of which each does the work of several, forward ones."""
        names = [n for n in dict.fromkeys(self.seen) if n.startswith("npu::") or any(word in n for word in _FUSED)]
        helpers = ("backward", "grad", "format_cast", "dtype_cast", "_copy", "view", "empty")
        return ", ".join(n.removeprefix("aten::") for n in names if not any(word in n for word in helpers))


@contextlib.contextmanager
def _reasons() -> Iterator[list[str]]:
    """What the device logs about operators that it does not use."""
    lines: list[str] = []
    logger = logging.getLogger("modellink_lora.device")

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collect()
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield lines
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def _forward_and_backward(function: Callable[..., Tensor], inputs: Tensors) -> list[Tensor]:
    """The result and the gradients of all inputs, for a gradient that is the same on every device."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    towards = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).cos()
    out.backward(towards.to(out.dtype).to(out.device))
    return [out, *(x.grad for x in leaves if x.grad is not None)]


def _both(mine: Callable[..., Tensor], right: Callable[..., Tensor], inputs: Tensors, here: torch.device) -> Any:
    wide = [x.double() for x in inputs]
    return _forward_and_backward(mine, [x.to(here) for x in inputs]), _forward_and_backward(right, wide)


def _rms_norm(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    def right(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * weight

    inputs = [_random(2, 96, 512, dtype=dtype), 1 + _random(512, dtype=dtype, scale=0.1)]
    return _both(lambda x, w: device.rms_norm(x, w, _EPS), right, inputs, here)


def _rms_norm_one_more(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    def right(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * (1 + weight)

    inputs = [_random(2, 96, 512, dtype=dtype), _random(512, dtype=dtype, scale=0.1)]
    return _both(lambda x, w: device.rms_norm(x, w, _EPS, one_more=True), right, inputs, here)


def _swiglu(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    def right(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return gate * gate.sigmoid() * up

    return _both(device.swiglu, right, [_random(2, 96, 512, dtype=dtype)], here)


def _attention(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Causal, with grouped heads: n 8, g 2, s 160, d 64."""

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, causal=True, scale=0.125)

    q, k, v = (_random(2, heads, 160, 64, dtype=dtype) for heads in (8, 2, 2))
    return _both(lambda q, k, v: device.attention(q, k, v, causal=True, scale=0.125), right, [q, k, v], here)


def _decoding(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """One query against a cache of which rows are filled to different places."""
    q, k, v = (_random(3, heads, tokens, 64, dtype=dtype) for heads, tokens in ((8, 1), (2, 96), (2, 96)))
    where = torch.tensor([[3], [95], [40]])
    with torch.no_grad():
        found = device.attention(*(x.to(here) for x in (q, k, v)), causal=True, scale=0.125, where=where.to(here))
    expected = softmax_attention(q.double(), k.double(), v.double(), causal=True, scale=0.125, where=where)
    return [found], [expected]


def _linear(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    x, weight, bias = (_random(*shape, dtype=dtype) for shape in ((4, 256), (1024, 256), (1024,)))
    with torch.no_grad():
        found = device.linear(weight.to(here), bias.to(here))(x.to(here))
    return [found], [F.linear(x.double(), weight.double(), bias.double())]


def _lora_ops(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """All four r-wide operations under dropout, whose mask must be the CPU's bit for bit: n 200, i 320, o 384, r 16."""
    ops = device.lora_ops
    x, dy, A, B, dx = (
        _random(*shape, dtype=dtype) for shape in ((200, 320), (200, 384), (16, 320), (384, 16), (200, 320))
    )
    rows, columns = torch.arange(200, dtype=torch.int32) * 7919 - 99999, torch.arange(320, dtype=torch.int32)
    mask, there = Mask(rows, columns, 0.25), Mask(rows.to(here), columns.to(here), 0.25)
    kept = (~mask.dropped()).double()
    low = (x.double() * kept @ A.double().t() * 0.5).to(dtype)  # the same for both from here on
    U = (dy.double() @ B.double()).to(dtype)
    mine = [t.to(here) for t in (x, dy, A, B, low, U, dx)]
    with torch.no_grad():
        added = mine[6].clone()
        ops.add_input_gradient(added, mine[5], mine[2], 0.5, there)
        found = [
            ops.down(mine[0], mine[2], there, 0.5), *ops.up_gradients(mine[1], mine[3], mine[4]), added,
            ops.down_gradient(mine[5], mine[0], there, 0.5),
        ]  # fmt: skip
    wide = [t.double() for t in (x, dy, A, B, low, U, dx)]
    expected = [
        wide[0] * kept @ wide[2].t() * 0.5, wide[1] @ wide[3], wide[1].t() @ wide[4],
        wide[6] + wide[5] @ wide[2] * 0.5 * kept, wide[5].t() @ (wide[0] * kept) * 0.5,
    ]  # fmt: skip
    return found, expected


def _gather_matmul(group: ProcessGroup) -> Check:
    def check(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        weight, parts = _random(384, 512, dtype=dtype), _random(group.size(), 64, 512, dtype=dtype)
        found = _fused(device, lambda: device.gather_matmul(parts[group.rank()].to(here), weight.to(here), group))
        whole = parts.flatten(0, 1)
        return found, [whole.double() @ weight.double().t(), whole]

    return check


def _matmul_scatter(group: ProcessGroup) -> Check:
    def check(device: Device, here: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        t = group.size()
        weights, parts = _random(t, 384, 512, dtype=dtype), _random(t, 64 * t, 512, dtype=dtype)
        rank = group.rank()
        found = _fused(device, lambda: device.matmul_scatter(parts[rank].to(here), weights[rank].to(here), group))
        total = (parts.double() @ weights.double().mT).sum(0)
        return found, [total.chunk(t)[rank]]

    return check


def _fused(device: Device, function: Callable[[], Any]) -> Tensors:
    """What the device's operator gives, without a gradient; NotImplementedError where it has none."""
    before, device.fused_collectives = device.fused_collectives, True
    try:
        with torch.no_grad():
            found = function()
    finally:
        device.fused_collectives = before
    if found is None:
        raise NotImplementedError
    return found if isinstance(found, tuple) else (found,)


CHECKS: dict[str, Check] = {
    "rms_norm": _rms_norm, "rms_norm (1 + weight)": _rms_norm_one_more, "swiglu": _swiglu, "attention": _attention,
    "attention while decoding": _decoding, "linear": _linear, "lora_ops": _lora_ops,
}  # fmt: skip


def world_group() -> ProcessGroup | None:
    """The group of all processes; None for one alone."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
