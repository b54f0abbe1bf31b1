"""How one Megatron tensor is made of Hugging Face tensors and cut over tensor-parallel ranks. Pure tensor arithmetic.

Letters: h hidden, f ffn, n query heads, g query groups, d head dim, r LoRA rank, t tensor parallel size.
Every layout obeys `split(fuse(parts)) == parts` and `gather([shard(x, i, t) for i in range(t)]) == x`, bit for bit,
for weights [out, in], biases [out] and LoRA B factors [out, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """Arrangement (`fuse`, `split`) and placement (`shard`, `gather`) of one tensor."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor: ...
    def split(self, full: Tensor) -> list[Tensor]: ...
    def shard(self, full: Tensor, rank: int, size: int) -> Tensor: ...
    def gather(self, shards: Sequence[Tensor]) -> Tensor: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return only

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full

    def gather(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class Column(Replicated):
    """Rows (outputs, dimension 0) cut into t consecutive blocks."""

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return _block(full, 0, rank, size)

    def gather(self, shards: Sequence[Tensor]) -> Tensor:
        return _cat(shards)


@dataclass(frozen=True)
class Row(Replicated):
    """Columns (inputs, dimension 1) cut into t consecutive blocks."""

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return _block(full, 1, rank, size)

    def gather(self, shards: Sequence[Tensor]) -> Tensor:
        return _cat(shards, dim=1)


@dataclass(frozen=True)
class QKV(Column):
    """Rows grouped by query group: (n/g * d rows of q)(d rows of k)(d rows of v), group after group."""

    heads: int
    groups: int
    head_dim: int

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts
        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in (q, k, v)]
        return _cat(grouped, dim=1).reshape(-1, *q.shape[1:])

    def split(self, full: Tensor) -> list[Tensor]:
        rows = (self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim)
        grouped = full.reshape(self.groups, sum(rows), *full.shape[1:])
        return [part.reshape(-1, *full.shape[1:]) for part in grouped.split(rows, dim=1)]


@dataclass(frozen=True)
class GroupedQKV(QKV):
    """A source that keeps q, k and v in one tensor whose rows are grouped like Megatron's."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return only

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class StackedQKV(QKV):
    """A source that keeps all rows of q, then all of k, then all of v in one tensor."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        (stacked,) = parts
        rows = (self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim)
        return super().fuse(stacked.split(rows))

    def split(self, full: Tensor) -> list[Tensor]:
        return [_cat(super().split(full))]


@dataclass(frozen=True)
class GateUp(Column):
    """[gate; up], and every shard is [gate_shard; up_shard]."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        gate, up = parts
        return _cat([gate, up])

    def split(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2, dim=0))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return _cat([_block(half, 0, rank, size) for half in full.chunk(2, dim=0)])

    def gather(self, shards: Sequence[Tensor]) -> Tensor:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return _cat([gate for gate, _ in halves] + [up for _, up in halves])


@dataclass(frozen=True)
class StackedGateUp(GateUp):
    """A source that keeps [gate; up] in one tensor."""

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return only

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class Vocab(Column):
    """Rows are tokens; the full tensor is padded to `padded` rows by repeating the last one."""

    rows: int
    padded: int

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        (full,) = parts
        full = full[: self.rows]
        extra = self.padded - full.shape[0]
        return _cat([full, full[-1:].expand(extra, *full.shape[1:])]) if extra else full

    def split(self, full: Tensor) -> list[Tensor]:
        return [full[: self.rows]]


def lora_layouts(base: Layout) -> tuple[Layout, Layout]:
    """Layouts of lora_A [r, in] and lora_B [out, r] on a linear of layout `base`: the factor on the cut side is cut."""
    return (Row(), Replicated()) if isinstance(base, Row) else (Replicated(), base)


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k whose rotary pairs are the halves of a head, put so that they are neighbours.

    Hugging Face and Megatron rotate row i together with row i + d/2, Meta's code and llama.cpp rows 2 i and 2 i + 1.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `neighbours`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat; of tensors without data by arithmetic, because torch then loads its compiler, which takes seconds."""
    if not parts[0].is_meta:
        return torch.cat(list(parts), dim=dim)
    shape, others = list(parts[0].shape), {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(others) > 1:
        raise RuntimeError(f"{[tuple(part.shape) for part in parts]} do not fit together")
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_empty(shape)


def _block(full: Tensor, dim: int, rank: int, size: int) -> Tensor:
    if full.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {tuple(full.shape)} does not divide into {size} blocks")
    width = full.shape[dim] // size
    return full.narrow(dim, rank * width, width)
