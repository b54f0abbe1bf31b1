"""Writing Megatron rank files at any layout: every file is laid out first, with room for its tensors, and filled after.

torch itself writes the archive, from tensors without data; this file finds the room it leaves and, at the end, puts
the checksums in, so that the result is what `torch.save` would have made.
"""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modellink_lora.checkpoint import dtypes, megatron_args
from modellink_lora.checkpoint.filling import Job, Tick, fill, ticking
from modellink_lora.checkpoint.hf import copy_companions
from modellink_lora.checkpoint.names import to_legacy
from modellink_lora.checkpoint.outfile import OutFile, Slot
from modellink_lora.checkpoint.rank_tree import EMBEDDING, HEAD, HF_FILES, Spelling, rank_file, shard_shape
from modellink_lora.checkpoint.store import iteration_folder, replacing_folder, write_tracker
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.family import TensorSpec
from modellink_lora.parallel.partition import Partition

# (global name, tensor rank, tensor parallel size) -> consecutive blocks of rows of that shard, in the result's dtype
Blocks = Callable[[str, int, int], Iterable[Tensor]]


@dataclass(frozen=True)
class RankLayout:
    """What the files of one checkpoint hold."""

    config: ModelConfig
    tp: int
    partition: Partition
    spelling: Spelling
    dtype: torch.dtype
    complete: bool = True  # whether every setting in `config` is known, or some may be defaults of another program

    @property
    def tied_copy(self) -> bool:
        """The last stage keeps a copy of an embedding that is its output layer too."""
        return not self.config.untie_embeddings_and_output_weights and self.partition.stages > 1

    def places(self) -> Iterator[tuple[TensorSpec, str, int, int]]:
        """(tensor, global name it is stored under, stage, chunk) of everything that one tensor rank holds."""
        family, where = family_of(self.config.hf_model_type), self.partition
        specs = list(family.tensors(self.config))
        for stage in range(where.stages):
            for chunk in range(where.chunks):
                for spec in specs:
                    if where.holds(spec.name, stage, chunk):
                        yield spec, spec.name, stage, chunk
                if self.tied_copy and where.holds(HEAD, stage, chunk):
                    yield family.tensor(EMBEDDING, self.config), HEAD, stage, chunk

    def shard_shape(self, spec: TensorSpec, rank: int = 0) -> tuple[int, ...]:
        return tuple(shard_shape(spec, self.config, rank, self.tp))

    def total_bytes(self) -> int:
        per_rank = sum(torch.Size(self.shard_shape(spec)).numel() for spec, *_ in self.places())
        return per_rank * self.tp * self.dtype.itemsize


def write_rank_files(
    root: Path,
    layout: RankLayout,
    shards: Blocks,
    *,
    iteration: int | str = 1,
    hf_files: Path | None = None,
    workers: int = 1,
    memory: int = 0,
    memory_of: Callable[[str], int] = lambda name: 0,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write a checkpoint and point the tracker at it when all is there.

    Args:
        shards: asked once for every place of every tensor.
        hf_files: model folder whose config and tokenizer files are kept in `<root>/hf`.
        memory: bytes that workers may hold together; `memory_of` a tensor of this name.
        check: called with the folder before it gets its name; what it raises keeps it from that.
    Returns:
        The folder of the iteration.
    """
    target = iteration_folder(root, iteration)
    number = iteration if isinstance(iteration, int) else 0
    places: dict[str, list[tuple[str, int]]] = {}  # global name -> (name it is stored under, stage)
    for spec, name, stage, _ in layout.places():
        places.setdefault(spec.name, []).append((name, stage))
    with replacing_folder(target) as temporary, contextlib.ExitStack() as stack:
        files: dict[tuple[int, int], OutFile] = {}
        for stage in range(layout.partition.stages):
            for rank in range(layout.tp):
                path = rank_file(temporary, rank, stage, layout.partition.stages)
                path.parent.mkdir()
                files[rank, stage] = stack.enter_context(_lay_out(path, layout, rank, stage, number))

        def job(name: str) -> Job:
            def run(tick: Tick) -> None:
                for rank in range(layout.tp):
                    for stored, stage in places[name]:
                        files[rank, stage].write(stored, ticking(shards(name, rank, layout.tp), tick))

            return Job(run, memory_of(name))

        jobs = [job(name) for name in places]
        fill(jobs, workers=workers, total=layout.total_bytes(), memory=memory, title=f"writing {target}")
        for file in files.values():
            _put_checksums(file)
            file.finish()
        if check is not None:
            check(temporary)
    if hf_files is not None and hf_files.resolve() != (root / HF_FILES).resolve():
        with replacing_folder(root / HF_FILES) as temporary:
            copy_companions(hf_files, temporary)
    write_tracker(root, iteration)
    return target


def whole_shards(layout: RankLayout, read: Callable[[str], Tensor]) -> Blocks:
    """`Blocks` cut from full tensors, for callers that have no blocks."""
    family = family_of(layout.config.hf_model_type)

    def shards(name: str, rank: int, size: int) -> Iterator[Tensor]:
        shard = family.tensor(name, layout.config).layout.shard(read(name), rank, size)
        yield dtypes.convert(shard, layout.dtype, name=name)

    return shards


def _lay_out(path: Path, layout: RankLayout, rank: int, stage: int, iteration: int) -> OutFile:
    """A rank file with everything in it but the values of its tensors."""
    args = megatron_args.namespace(
        layout.config, tp=layout.tp, partition=layout.partition, legacy=layout.spelling == "legacy",
        dtype=layout.dtype, iteration=iteration,
    )  # fmt: skip
    if not layout.complete:
        megatron_args.leave_open(args)
    chunks = layout.partition.chunks
    models: list[dict[str, Any]] = [{} for _ in range(chunks)]
    names: dict[int, str] = {}
    with FakeTensorMode():
        for spec, name, held_by, chunk in layout.places():
            if held_by != stage:
                continue
            tensor = torch.empty(layout.shard_shape(spec, rank), dtype=layout.dtype)
            names[id(tensor)] = name
            local = layout.partition.to_local(name, stage, chunk)
            _put(models[chunk], local, tensor, layout.spelling, tied=layout.tied_copy)
    keys = ["model"] if chunks == 1 else [f"model{chunk}" for chunk in range(chunks)]
    document = {"args": args, "checkpoint_version": 3.0, "iteration": iteration, **dict(zip(keys, models, strict=True))}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(document, path)
    # storages are numbered in the order in which pickling meets them
    slots = [Slot(names[id(t)], tuple(t.shape), t.dtype) for model in models for t in _leaves(model)]
    rooms = _rooms(path)
    assert [room.file_size for room, _ in rooms] == [slot.nbytes for slot in slots], f"{path}: unexpected archive"
    offsets = {slot.name: offset for slot, (_, offset) in zip(slots, rooms, strict=True)}
    return OutFile(path, slots, offsets, checksums=True)


def _rooms(path: Path) -> list[tuple[zipfile.ZipInfo, int]]:
    """Entry of every storage of a torch archive, in order of their numbers, and the offset of its first byte."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        found = []
        for entry in archive.infolist():
            head, _, number = entry.filename.rpartition("/")
            if number.isdigit() and head.count("/") == 1 and head.endswith("/data"):
                file.seek(entry.header_offset + 26)
                lengths = sum(struct.unpack("<HH", file.read(4)))  # of name and extra field of the local header
                found.append((int(number), entry, entry.header_offset + 30 + lengths))
    return [(entry, offset) for _, entry, offset in sorted(found, key=lambda item: item[0])]


def _put_checksums(file: OutFile) -> None:
    """CRC-32 of every storage into the two places where a zip archive keeps it."""
    rooms = _rooms(file.path)
    with zipfile.ZipFile(file.path) as archive:
        position, order = archive.start_dir, [entry.header_offset for entry in archive.infolist()]
    crcs = {
        entry.header_offset: (file.crc32[name], offset + entry.file_size)
        for name, (entry, offset) in zip(file.slots, rooms, strict=True)
    }
    with file.path.open("rb") as read:
        for header_offset in order:  # the central directory lists the entries in the same order
            read.seek(position)
            entry = read.read(46)
            assert entry[:4] == b"PK\1\2", f"{file.path}: unexpected archive"
            if header_offset in crcs:
                crc, end = crcs[header_offset]
                file.patch(struct.pack("<I", crc), position + 16)
                read.seek(end)
                assert read.read(4) == b"PK\7\x08", f"{file.path}: unexpected archive"  # the data descriptor
                file.patch(struct.pack("<I", crc), end + 4)
            position += 46 + sum(struct.unpack("<HHH", entry[28:34]))


def _put(model: dict[str, Any], name: str, tensor: Tensor, spelling: Spelling, *, tied: bool) -> None:
    path = (name,) if spelling == "mcore" else to_legacy(name, tied=tied)
    for key in path[:-1]:
        model = model.setdefault(key, {})
    model[path[-1]] = tensor


def _leaves(node: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in node.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value
