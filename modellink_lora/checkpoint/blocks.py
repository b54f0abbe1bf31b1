"""The projections of a PEFT adapter inside our fused factors: where each lies and how it was scaled, kept exactly.

PEFT adapts q, k and v (gate and up) one by one. A fused linear has one lora_A [R, in] and one lora_B [out, R]: the
different A's are stacked, each projection's B fills its own rows and the columns of its own A, and B A is row for row
what PEFT adds. Its scaling may differ by projection, a fused linear has one: what is stored is B as PEFT had it, and
what is computed with is B times the ratio of the two. Letters: r rank of one projection, R of the fused factor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.dtypes import DTYPES
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.models.layouts import Layout


@dataclass(frozen=True)
class Block:
    """One Hugging Face projection of a fused linear."""

    start: int  # row of the fused lora_A at which its own begins
    r: int
    alpha: float
    dtypes: tuple[str, str]  # of its lora_A and lora_B

    def scaling(self, *, rslora: bool) -> float:
        return self.alpha / (math.sqrt(self.r) if rslora else self.r)


Blocks = Sequence[Block | None]  # one for each projection; None: PEFT does not adapt it


@dataclass(frozen=True)
class PeftOrigin:
    """What an adapter was as a PEFT folder. It holds while nothing is trained on."""

    settings: dict[str, Any]  # adapter_config.json
    blocks: dict[str, tuple[Block | None, ...]]  # of every module


def ratios(module: str, blocks: Blocks, lora: LoraConfig) -> list[float]:
    """What each projection's B is multiplied by so that one scaling does for the whole linear."""
    whole = lora.scaling_of(module)
    found = [part.scaling(rslora=lora.use_rslora) / whole if part else 1.0 for part in blocks]
    return [1.0 if math.isclose(ratio, 1.0, rel_tol=1e-12) else ratio for ratio in found]  # alpha R / r / R rounds


def scaled_b(b: Tensor, layout: Layout, factors: Sequence[float]) -> Tensor:
    """B [out, R] with the rows of each projection times its factor, rounded once to fp32; B itself if all are 1."""
    if all(factor == 1.0 for factor in factors):
        return b
    parts = layout.split(b)
    return layout.fuse([(part.double() * f).float() for part, f in zip(parts, factors, strict=True)])


def take_apart(a: Tensor, b: Tensor, layout: Layout, blocks: Blocks) -> list[tuple[Tensor, Tensor] | None]:
    """The factors that `put_together` was given."""
    result: list[tuple[Tensor, Tensor] | None] = []
    for part, block in zip(layout.split(b), blocks, strict=True):
        if block is None:
            result.append(None)
            continue
        held = slice(block.start, block.start + block.r)
        kinds = [DTYPES[name] for name in block.dtypes]
        result.append((a[held].to(kinds[0], copy=True), part[:, held].to(kinds[1]).contiguous()))
    return result


def put_together_a(parts: Mapping[int, Tensor]) -> Tensor:
    """[R, in] of the A's by the row at which each begins."""
    return torch.cat([parts[start] for start in sorted(parts)])  # of different dtypes: the widest, which is exact


def put_together_b(
    parts: Sequence[Tensor | None], blocks: Blocks, layout: Layout, *, rows: Sequence[int], r: int
) -> Tensor:
    """[out, R] of the B's [out of the projection, r], rows in the order of the fused weight."""
    dtype = functools.reduce(torch.promote_types, (b.dtype for b in parts if b is not None))
    whole = []
    for b, block, count in zip(parts, blocks, rows, strict=True):
        piece = torch.zeros(count, r, dtype=dtype)
        if b is not None and block is not None:
            piece[:, block.start : block.start + block.r] = b
        whole.append(piece)
    return layout.fuse(whole)
