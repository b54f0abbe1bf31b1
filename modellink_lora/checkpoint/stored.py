"""A full tensor of the model as the parts it lies in on disk: nothing is read before somebody looks at the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from modellink_lora.models.layouts import Layout


@dataclass(frozen=True)
class Stored:
    """`join(parts)` is the full Megatron tensor; a layout's `fuse` or `gather`, so it moves rows or columns only."""

    parts: Sequence[Tensor]  # mapped from their files
    layout: Layout  # of the source, whose vocabulary may be padded otherwise than the result's
    join: Callable[[Sequence[Tensor]], Tensor]
