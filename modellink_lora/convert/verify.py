"""Reading a result again, with the readers that everybody uses, and comparing every byte with what it should be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from modellink_lora.checkpoint.hf import HfFolder
from modellink_lora.checkpoint.meta import PARAMS, MetaLayout, read_meta, weights_file
from modellink_lora.checkpoint.outfile import memory_of
from modellink_lora.checkpoint.rank_files import as_model
from modellink_lora.checkpoint.rank_tree import Spelling, open_tree
from modellink_lora.config.errors import UserError
from modellink_lora.convert.meta import meta_blocks
from modellink_lora.convert.plan import Plan
from modellink_lora.convert.transfer import Transfer


def verify(folder: Path, plan: Plan, transfer: Transfer, *, spelling: Spelling) -> str:
    """One line on what was compared. Every tensor is made again from the source, and read again from the disk.

    Raises:
        UserError: a tensor that was read differs from the one that should have been written.
    """
    _forget(folder)
    count, total = 0, hashlib.sha256()
    # a merged tensor made a second time must not be counted twice in the report
    again = Transfer(transfer.stored, transfer.adapter)
    for name, found, expected in _pairs(folder, plan, again, spelling):
        if (digest := _digest([found])) != _digest(expected):
            raise UserError(f"{folder}: {name} read back differs from what was written: disk or memory is faulty")
        total.update(digest)
        count += 1
    return f"verified: {count} tensors read back are the same bytes, sha256 of all {total.hexdigest()[:16]}"


def _pairs(
    folder: Path, plan: Plan, transfer: Transfer, spelling: Spelling
) -> Iterator[tuple[str, Tensor, Iterable[Tensor]]]:
    if (folder / "config.json").is_file():
        written = HfFolder(folder, flag="--save-dir")
        expected = {name for move in plan.moves for name in move.spec.hf}
        if odd := expected ^ set(written.names()):
            raise UserError(f"{folder}: {min(odd)} is not where it should be")
        for move in plan.moves:
            for number, name in enumerate(move.spec.hf):
                yield name, written.read(name), transfer.part(move, number)
        return
    if (folder / PARAMS).is_file():
        layout = MetaLayout(plan.config, plan.tp, plan.dtype, plan.dtypes)
        for tensor, rank, found in read_meta(folder, layout):
            yield f"{tensor.name} of {weights_file(rank)}", found, meta_blocks(transfer, plan, tensor, rank)
        return
    tree = open_tree(folder, flag="--save-dir")
    files = as_model(tree, folder.parent, tree.iteration, flag="--save-dir")
    if (files.tp, files.partition, files.ep, files.spelling) != (plan.tp, plan.partition, plan.ep, spelling):
        raise UserError(f"{folder}: the layout read back is not the one written")
    for move in plan.moves:
        for rank, shard in enumerate(files.stored(move.spec.name).parts):
            for found in (shard, *files.copies(move.spec.name, rank)):
                yield f"{move.spec.name} of rank {rank}", found, transfer.shard(move, rank, plan.tp)


def _digest(blocks: Iterable[Tensor]) -> bytes:
    digest = hashlib.sha256()
    dtype = None
    for block in blocks:
        dtype = block.dtype
        digest.update(memory_of(block))
    digest.update(repr(dtype).encode())
    return digest.digest()


def _forget(folder: Path) -> None:
    """Ask the system to drop its copies of the files, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
