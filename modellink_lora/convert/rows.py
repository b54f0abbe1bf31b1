"""Which rows (or columns) of the source's parts become which of a target tensor: a layout asked about numbers.

A layout moves rows, or cuts columns, of any tensor alike, so it is asked once with the numbers of the rows in their
place. What comes out says where each row of the target lies, in the source's parts and in the full tensor, and the
target can then be copied run by run without ever being put together. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink_lora.models.layouts import Layout, Row, Vocab

_PART = 40  # bits of a row's number, below the number of its part


@dataclass(frozen=True)
class Run:
    """`length` consecutive rows (columns of a tensor that is cut by columns)."""

    part: int  # of the source
    source: int  # first row in that part
    full: int  # first row in the full tensor
    target: int  # first row in the target
    length: int


@dataclass(frozen=True)
class Runs:
    """A target tensor as runs of the source, in the target's order."""

    runs: tuple[Run, ...]
    dim: int  # that the runs go along
    size: int  # of the target along it


def runs_of(
    sizes: Sequence[int],
    dimensions: int,
    *,
    join: Callable[[Sequence[Tensor]], Tensor],
    layout: Layout,
    pick: Callable[[Tensor], Tensor],
) -> Runs:
    """How to make a target.

    Args:
        sizes: of the source's parts along `cut_dimension`.
        dimensions: of the tensor.
        join: the parts put together, of the source's layout.
        layout: of the result, which may pad the vocabulary otherwise.
        pick: the target taken from the full tensor: one part of its split, or one shard.
    """
    dim = cut_dimension(layout, dimensions)
    parts = [_shaped(torch.arange(size) + (number << _PART), dim) for number, size in enumerate(sizes)]
    full = join(parts)
    if isinstance(layout, Vocab) and full.shape[0] != layout.padded:
        full = layout.fuse([full])
    codes = pick(full).reshape(-1)
    places = pick(_shaped(torch.arange(full.numel()), dim)).reshape(-1)
    # a run ends where either number does not go on by one
    breaks = ((codes.diff() != 1) | (places.diff() != 1)).nonzero()[:, 0] + 1
    starts = [0, *breaks.tolist()] if len(codes) else []
    ends = [*starts[1:], len(codes)]
    runs = []
    for start, end in zip(starts, ends, strict=True):
        code, place = int(codes[start]), int(places[start])
        runs.append(Run(code >> _PART, code & ((1 << _PART) - 1), place, start, end - start))
    return Runs(tuple(runs), dim, len(codes))


def cut_dimension(layout: Layout, dimensions: int) -> int:
    """The dimension that a layout works on: columns where a linear is cut along its inputs, rows elsewhere."""
    return 1 if isinstance(layout, Row) and dimensions == 2 else 0


def _shaped(numbers: Tensor, dim: int) -> Tensor:
    return numbers[None] if dim == 1 else numbers
