"""W' = W + scaling * B A, computed so that every layout and block size gives the same bits. Pure tensor arithmetic.

What the sum is, bit for bit: the factors have at most 24 significant bits, so each product b * a is exact in fp64 and
only the order of the r additions could matter: it is rank by rank (`_in_order`). The sum is rounded once, to the dtype
asked for. How it is computed: by a matrix product, which is faster but adds in an order of its own. It errs by less
than a known bound; where that could change the rounded result, which is at a few values in a million, and only there,
the value is computed again in order. Letters: r rank; W is [out, in], B [out, r], A [r, in].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink_lora.config.errors import UserError

_LOST = (1 << 29) - 1  # the bits of an fp64 significand (53) below those of an fp32 one (24)
_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}  # of a significand, the hidden one included
_BLOCK = 1 << 17  # values in fp64 at a time: what a core's own cache holds


@dataclass
class Change:
    """What merging did to one weight, gathered block by block."""

    largest: float = 0.0  # |W' - W|, exact
    weight: float = 0.0  # sums of squares: of W,
    update: float = 0.0  # of W' - W before rounding
    lost: float = 0.0  # of what rounding W' took away
    worst_rounding: float = 0.0
    values: int = 0

    def add(self, other: Change) -> None:
        self.largest = max(self.largest, other.largest)
        self.worst_rounding = max(self.worst_rounding, other.worst_rounding)
        self.weight += other.weight
        self.update += other.update
        self.lost += other.lost
        self.values += other.values


@dataclass(frozen=True)
class Factors:
    """A linear's adapter in the form that merging wants: A once in fp64, and what bounds the error of a product."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    a: Tensor = field(init=False)  # [r, in] in fp64
    norm: float = field(init=False)  # greatest Euclidean norm of a column of A

    def __post_init__(self) -> None:
        assert self.lora_A.dtype != torch.float64 != self.lora_B.dtype, "products of fp64 factors would not be exact"
        assert self.lora_A.shape[0] == self.lora_B.shape[1]
        object.__setattr__(self, "a", self.lora_A.double())
        object.__setattr__(self, "norm", self.a.square().sum(0).max().sqrt().item())


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> Tensor:
    """The weight with its adapter folded in, in `dtype` (the weight's own by default).

    Args:
        rows: output rows in memory as fp64 at a time; it changes speed only.
    Raises:
        UserError: a value that was finite is not in the result's dtype.
    """
    assert weight.shape == (lora_B.shape[0], lora_A.shape[1])
    result = torch.empty(weight.shape, dtype=dtype or weight.dtype)
    merge_into(result, weight, Factors(lora_A, lora_B, scaling), slice(0, weight.shape[0]), rows=rows)
    return result


def merge_into(
    result: Tensor,
    weight: Tensor,
    factors: Factors,
    outputs: slice | Tensor,
    *,
    rows: int | None = None,
    workspace: Workspace | None = None,
) -> Change:
    """Fill `result` with `weight` and its update; both hold the `outputs` rows of the linear, and all its columns."""
    lora_b, change = factors.lora_B[outputs], Change()
    columns = weight.shape[1]
    step = min(rows or max(1, _BLOCK // max(1, columns)), weight.shape[0])
    space = workspace or Workspace()
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        change.add(_merge_block(result[block], weight[block], lora_b[block].double(), factors, space))
    return change


class Workspace:
    """Memory that is used again for every block: pages fresh from the system would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.float64)

    def three(self, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        size = rows * columns
        if self._held.numel() < 3 * size:
            self._held = torch.empty(3 * size, dtype=torch.float64)
        first, second, third = self._held[: 3 * size].view(3, rows, columns)
        return first, second, third


def _merge_block(result: Tensor, weight: Tensor, b: Tensor, factors: Factors, space: Workspace) -> Change:
    """One block that fits into the cache; `b` [rows, r] is fp64."""
    exact, base, work = space.three(*weight.shape)
    torch.mm(b * factors.scaling, factors.a, out=exact)  # the update alone
    base.copy_(weight)
    low, high = (end.item() for end in exact.aminmax())
    change = Change(max(-low, high), _square(base), _square(exact), values=weight.numel())
    exact.add_(base)
    if (doubtful := _doubtful(exact, b, factors, result.dtype, work.view(torch.int64))) is not None:
        row, column = doubtful
        exact[row, column] = _in_order(b[row], factors.a[:, column], factors.scaling, base[row, column])
    result.copy_(round_once(exact, result.dtype, work))
    rounding = base.copy_(result).sub_(exact)
    low, high = (end.item() for end in rounding.aminmax())
    change.worst_rounding, change.lost = max(-low, high), _square(rounding)
    if not change.worst_rounding < float("inf") and not result.isfinite().all() and exact.isfinite().all():
        raise UserError(
            f"the merged weight reaches {exact.abs().max().item():.3g}, which does not fit {result.dtype}: "
            "choose --params-dtype bf16 or fp32"
        )
    return change


def _in_order(b: Tensor, a: Tensor, scaling: float, base: Tensor) -> Tensor:
    """The defined value of some elements: b [n, r], a [r, n], base [n]."""
    exact = torch.zeros_like(base)
    for k in range(a.shape[0]):
        exact += b[:, k] * a[k]  # the product is exact
    return exact * scaling + base


def _doubtful(
    exact: Tensor, b: Tensor, factors: Factors, dtype: torch.dtype, work: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(rows, columns) of the values whose rounding an error of the matrix product could change; None: there are none.

    Both orders of adding err by at most (r + 3) units of 2^-53 of the sum of |scaling b a|, and twice that is less than
    `width` units in the last place of any value not smaller than `small`: within `width` of the middle between two
    neighbours of `dtype`, or below `small`, or below the normal range of `dtype`, where the middles lie elsewhere.
    """
    lost = 53 - _BITS[dtype]
    width = 1 << (lost // 2 + 4)
    # of the sums of |scaling b a|, by Cauchy and Schwarz
    bound = b.square().sum(1).max().sqrt().item() * factors.norm * abs(factors.scaling)
    small = max(bound * 2 * (len(factors.a) + 4) / width, 2 * torch.finfo(dtype).tiny)
    floor = int(torch.tensor(small, dtype=torch.float64).view(torch.int64).item())
    bits = exact.view(torch.int64)

    def from_middle(bits: Tensor, out: Tensor) -> Tensor:  # `width` more than the distance, modulo the lost bits
        return torch.add(bits, width - (1 << (lost - 1)), out=out).bitwise_and_((1 << lost) - 1)

    def magnitude(bits: Tensor, out: Tensor) -> Tensor:
        return torch.bitwise_and(bits, (1 << 63) - 1, out=out)

    near = from_middle(bits, work).amin(1).le(2 * width)
    rows = near.logical_or_(magnitude(bits, work).amin(1).le(floor)).nonzero()[:, 0]
    if not len(rows):
        return None
    bits = bits[rows]
    few = work[: len(rows)]
    doubt = from_middle(bits, few).le(2 * width)
    row, column = doubt.logical_or_(magnitude(bits, few).le(floor)).nonzero(as_tuple=True)
    return rows[row], column


def round_once(exact: Tensor, dtype: torch.dtype, work: Tensor | None = None) -> Tensor:
    """fp64 rounded to nearest, ties to even.

    torch takes 16-bit types through fp32 and so rounds twice. Rounding to the 24 bits of fp32 "to odd" first (cut off,
    and set the last bit if anything was lost) leaves nothing to the step to fp32 and decides every tie of the last one.

    Args:
        work: memory of the size of `exact` that may be overwritten.
    """
    if dtype in (torch.float32, torch.float64):
        return exact.to(dtype)
    bits = exact.view(torch.int64)
    odd = torch.empty_like(bits) if work is None else work.view(torch.int64)
    # adding _LOST to the lost bits carries into the last kept bit exactly when one of them is set
    torch.bitwise_and(bits, _LOST, out=odd).add_(_LOST).bitwise_or_(bits).bitwise_and_(~_LOST)
    return odd.view(torch.float64).to(dtype)


def _square(values: Tensor) -> float:
    flat = values.reshape(-1)
    return torch.dot(flat, flat).item()
