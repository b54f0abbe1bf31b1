"""The r-wide operations of a LoRA linear in plain PyTorch: right on every device, and the measure of faster ones.

Letters: n tokens, i inputs, o outputs, r rank. Masks are hashed where they are needed and never stored; what is wider
than r is masked or cast in blocks, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modellink_lora.device.hashing import dropped

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_ALL = slice(None)
_CPU_BLOCK = 2**19  # elements: in the last cache
_ACCELERATOR_BLOCK = 2**24  # few launches


@dataclass(frozen=True)
class Mask:
    """Dropout on an input [n, i]: which elements it takes follows from one key a row and one number a column."""

    rows: Tensor  # [n] int32
    columns: Tensor  # [i] int32
    p: float

    def dropped(self) -> Tensor:
        """bool [n, i]"""
        return dropped(self.rows[:, None], self.columns, self.p)

    def part(self, rows: slice, columns: slice) -> Mask:
        return replace(self, rows=self.rows[rows], columns=self.columns[columns])


class LoraOps:
    """Works on 2-D tensors. Nothing is scaled by 1/(1-p): that belongs into the caller's r-wide factors.

    The rows of x, dy and dx may lie further apart than they are wide. They may be of another dtype than the adapter's
    A, B, low and U; results are of the adapter's dtype.
    """

    def down(self, x: Tensor, A: Tensor, mask: Mask | None, scale: float = 1.0) -> Tensor:
        """x [n, i], A [r, i] -> scale * (x without dropped elements) A^T [n, r]"""
        wide = _compute_dtype(A)
        if mask is None and x.dtype == wide:
            return scaled_product(x, A.t(), scale)
        low, right = A.new_empty((len(x), len(A)), dtype=wide), (A.to(wide) * scale).t()
        for rows in _blocks(len(x), x.shape[1], x.device):
            torch.mm(_taken(x, mask, rows, _ALL, wide), right, out=low[rows])
        return low.to(A.dtype)

    def up_gradients(self, dy: Tensor, B: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """dy [n, o], B [o, r], low [n, r] -> U = dy B [n, r], dB = dy^T low [o, r]"""
        wide = _compute_dtype(B)
        if dy.dtype == wide:
            return dy @ B, dy.t() @ low
        U, dB = torch.empty_like(low, dtype=wide), torch.zeros_like(B, dtype=wide)
        right, left = B.to(wide), low.to(wide)
        for rows in _blocks(len(dy), dy.shape[1], dy.device):
            part = dy[rows].to(wide)
            torch.mm(part, right, out=U[rows])
            dB.addmm_(part.t(), left[rows])
        return U.to(low.dtype), dB.to(B.dtype)

    def add_input_gradient(self, dx: Tensor, U: Tensor, A: Tensor, scale: float, mask: Mask | None) -> None:
        """dx [n, i] += scale * (U [n, r] A [r, i] without dropped elements), in place"""
        wide = _compute_dtype(A)
        if mask is None and dx.dtype == wide:
            dx.addmm_(U, A, alpha=scale)
            return
        left, right = U.to(wide) * scale, A.to(wide)
        for rows in _blocks(len(dx), dx.shape[1], dx.device):
            part = left[rows] @ right
            if mask is not None:
                _zero(part, mask.part(rows, _ALL))
            dx[rows] += part  # of a wider dtype, if dx is narrow: rounded once

    def down_gradient(self, U: Tensor, x: Tensor, mask: Mask | None, scale: float = 1.0) -> Tensor:
        """U [n, r], x [n, i] -> scale * U^T (x without dropped elements) [r, i]"""
        wide = _compute_dtype(U)
        if mask is None and x.dtype == wide:
            return scaled_product(U.t(), x, scale)
        left = (U.to(wide) * scale).t()
        gradient = U.new_empty((U.shape[1], x.shape[1]))
        for columns in _blocks(x.shape[1], len(x), x.device):  # of columns: no sum runs over blocks
            gradient[:, columns] = left @ _taken(x, mask, _ALL, columns, wide)
        return gradient


def _compute_dtype(factor: Tensor) -> torch.dtype:
    """The adapter's dtype; on a CPU fp32 for a narrower one: many have no bf16 instructions, and casts are cheap."""
    return torch.float32 if factor.device.type == "cpu" and factor.dtype.itemsize < 4 else factor.dtype


def _blocks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices over `count` lines of `width` elements."""
    step = max(1, (_CPU_BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK) // max(1, width))
    return (slice(start, start + step) for start in range(0, count, step))


def _taken(x: Tensor, mask: Mask | None, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """A copy of a block of x in `dtype`, dropped elements zeroed."""
    part = x[rows, columns].to(dtype, copy=True)
    if mask is not None:
        _zero(part, mask.part(rows, columns))
    return part


def _zero(x: Tensor, mask: Mask) -> None:
    """Zero dropped elements in place."""
    if x.device.type == "cpu":  # a product of integers: vectorized there, unlike masked_fill, and 0 * nan is 0
        x.view(_INTEGERS[x.itemsize]).mul_(mask.dropped().logical_not_())
    else:
        x.masked_fill_(mask.dropped(), 0)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one operator."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
