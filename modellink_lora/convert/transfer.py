"""From the source's parts to blocks of a target tensor: copied, converted or merged a megabyte at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink_lora.adapters.merge import Change, Factors, Workspace, merge_into
from modellink_lora.checkpoint import dtypes
from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.stored import Stored
from modellink_lora.config.errors import UserError
from modellink_lora.convert.plan import BLOCK_BYTES, Move
from modellink_lora.convert.rows import Runs, cut_dimension, runs_of
from modellink_lora.models.finite import check_weight

_HERE = threading.local()  # each thread's workspace of merging


@dataclass
class Transfer:
    """The tensors of the result, merged, padded and in their dtypes, made from a source's parts."""

    stored: Callable[[str], Stored]
    adapter: Adapter | None
    changes: dict[str, Change] = field(default_factory=dict)  # of each merged weight
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def part(self, move: Move, number: int) -> Iterator[Tensor]:
        """Blocks of the Hugging Face tensor `move.spec.hf[number]`."""
        layout = move.spec.layout
        return self.blocks(move, lambda full: layout.split(full)[number], move.dtypes[number])

    def shard(self, move: Move, rank: int, size: int) -> Iterator[Tensor]:
        """Blocks of one shard; shards are merged on their own, which gives the same bits and does no work twice."""
        layout = move.spec.layout
        return self.blocks(move, lambda full: layout.shard(full, rank, size))

    def blocks(
        self, move: Move, pick: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """Blocks of what `pick` takes from the full tensor: any rows, or columns where the layout cuts these.

        Args:
            dtype: of the blocks; default that of the whole move.
        """
        dtype = dtype or move.dtype
        stored = self.stored(move.spec.name)
        dimensions = stored.parts[0].dim()
        sizes = [part.shape[cut_dimension(move.spec.layout, dimensions)] for part in stored.parts]
        runs = runs_of(sizes, dimensions, join=stored.join, layout=move.spec.layout, pick=pick)
        if move.rank is None or self.adapter is None:
            blocks = self._copied(move, stored.parts, runs, dtype)
        else:
            blocks = self._merged(move, stored.parts, runs, self.adapter, dtype)
        for block in blocks:
            check_weight(block, block.dtype, move.spec.name)
            yield block

    def _copied(self, move: Move, parts: Sequence[Tensor], runs: Runs, dtype: torch.dtype) -> Iterator[Tensor]:
        same = all(parts[run.part].dtype == dtype for run in runs.runs)
        if runs.dim == 0 and same:  # straight from the source's pages
            for run in runs.runs:
                for rows in _pieces(run.length, _row_bytes(parts[run.part])):
                    yield parts[run.part][run.source + rows.start : run.source + rows.stop]
            return
        for first, count in _row_blocks(parts, runs):
            block = _gather(parts, runs, first, count)
            yield dtypes.convert(block, dtype, name=move.spec.name)

    def _merged(
        self, move: Move, parts: Sequence[Tensor], runs: Runs, adapter: Adapter, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        module = move.module
        lora_A, lora_B = adapter.read(f"{module}.lora_A"), adapter.read(f"{module}.lora_B")
        if runs.dim == 1:
            lora_A = torch.cat([lora_A[:, run.full : run.full + run.length] for run in runs.runs], dim=1)
            outputs = torch.arange(len(lora_B))
        else:
            outputs = torch.cat([torch.arange(run.full, run.full + run.length) for run in runs.runs])
        factors = Factors(lora_A, lora_B, adapter.meta.lora.scaling_of(module))
        change = Change()
        if not hasattr(_HERE, "workspace"):
            _HERE.workspace = Workspace()
        for first, count in _row_blocks(parts, runs):
            weight = _gather(parts, runs, first, count)
            result = torch.empty(weight.shape, dtype=dtype)
            try:
                change.add(
                    merge_into(result, weight, factors, outputs[first : first + count], workspace=_HERE.workspace)
                )
            except UserError as error:
                raise UserError(f"{move.spec.name}: {error}") from None
            yield result
        with self._lock:
            self.changes.setdefault(move.spec.name, Change()).add(change)


def _row_bytes(part: Tensor) -> int:
    return part[:1].numel() * part.element_size()


def _pieces(length: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def _row_blocks(parts: Sequence[Tensor], runs: Runs) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each block of the target."""
    rows = runs.size if runs.dim == 0 else parts[0].shape[0]
    width = _row_bytes(parts[0]) if runs.dim == 0 else runs.size * parts[0].element_size()
    for piece in _pieces(rows, width):
        yield piece.start, piece.stop - piece.start


def _gather(parts: Sequence[Tensor], runs: Runs, first: int, count: int) -> Tensor:
    """`count` rows of the target from `first` on, in the source's dtype; a view where they lie together."""
    if runs.dim == 1:
        pieces = [parts[r.part][first : first + count, r.source : r.source + r.length] for r in runs.runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    pieces = []
    for run in runs.runs:
        start, stop = max(first, run.target), min(first + count, run.target + run.length)
        if start < stop:
            offset = run.source - run.target
            pieces.append(parts[run.part][start + offset : stop + offset])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
