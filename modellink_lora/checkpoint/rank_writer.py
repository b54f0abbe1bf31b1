"""Writing Megatron rank files at any layout: every file is laid out first, with room for its tensors, filled after."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint import dtypes, megatron_args
from modellink_lora.checkpoint.companions import copy_companions
from modellink_lora.checkpoint.experts import holders, renumbered
from modellink_lora.checkpoint.filling import Job, Tick, fill, ticking
from modellink_lora.checkpoint.names import to_legacy
from modellink_lora.checkpoint.outfile import OutFile
from modellink_lora.checkpoint.rank_tree import EMBEDDING, HEAD, HF_FILES, Spelling, rank_file, shard_shape
from modellink_lora.checkpoint.store import iteration_folder, pointing_at, replacing_folder
from modellink_lora.checkpoint.torch_file import put_checksums, torch_file
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
    ep: int = 1
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of tensors by global name, else `dtype`
    complete: bool = True  # whether every setting in `config` is known, or some may be defaults of another program

    @property
    def tied_copy(self) -> bool:
        """The last stage keeps a copy of an embedding that is its output layer too."""
        return not self.config.untie_embeddings_and_output_weights and self.partition.stages > 1

    def places(self) -> Iterator[tuple[TensorSpec, str, int, int]]:
        """(tensor, global name it is stored under, stage, chunk) of everything in the files of one tensor rank."""
        return iter(self._places)

    @functools.cached_property
    def _places(self) -> list[tuple[TensorSpec, str, int, int]]:
        family, where = family_of(self.config.hf_model_type), self.partition
        specs, found = list(family.tensors(self.config)), []
        for stage in range(where.stages):
            for chunk in range(where.chunks):
                found += [(spec, spec.name, stage, chunk) for spec in specs if where.holds(spec.name, stage, chunk)]
                if self.tied_copy and where.holds(HEAD, stage, chunk):
                    found.append((family.tensor(EMBEDDING, self.config), HEAD, stage, chunk))
        return found

    def shard_shape(self, spec: TensorSpec, rank: int = 0) -> tuple[int, ...]:
        return tuple(shard_shape(spec, self.config, rank, self.tp))

    def holders(self, name: str) -> Sequence[int]:
        """Expert-parallel ranks that hold the tensor of this global name."""
        return holders(name, self.config.num_experts, self.ep)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, self.dtype)

    def total_bytes(self) -> int:
        per_rank = sum(
            torch.Size(self.shard_shape(spec)).numel() * len(self.holders(name)) * self.dtype_of(spec.name).itemsize
            for spec, name, *_ in self.places()
        )
        return per_rank * self.tp


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
    # everything is on the disk before the first of them gets its name: the iteration, then hf, then the tracker
    with contextlib.ExitStack() as around, replacing_folder(target) as temporary, contextlib.ExitStack() as stack:
        around.enter_context(pointing_at(root, iteration))
        if hf_files is not None and hf_files.resolve() != (root / HF_FILES).resolve():
            copy_companions(hf_files, around.enter_context(replacing_folder(root / HF_FILES)))
        files: dict[tuple[int, int, int], OutFile] = {}
        stages = layout.partition.stages
        for stage, rank, expert in itertools.product(range(stages), range(layout.tp), range(layout.ep)):
            path = rank_file(temporary, rank, stage, stages, expert, layout.ep)
            path.parent.mkdir()
            files[rank, stage, expert] = stack.enter_context(_lay_out(path, layout, rank, stage, expert, number))

        def job(name: str) -> Job:
            def run(tick: Tick) -> None:
                for rank in range(layout.tp):
                    for stored, stage in places[name]:
                        first, *also = (files[rank, stage, expert] for expert in layout.holders(stored))
                        blocks = ticking(shards(name, rank, layout.tp), tick, times=1 + len(also))
                        first.write(stored, blocks, also=also)

            return Job(run, memory_of(name))

        jobs = [job(name) for name in places]
        fill(jobs, workers=workers, total=layout.total_bytes(), memory=memory, title=f"writing {target}")
        for file in files.values():
            put_checksums(file)
            file.finish()
        if check is not None:
            check(temporary)
    return target


def whole_shards(layout: RankLayout, read: Callable[[str], Tensor]) -> Blocks:
    """`Blocks` cut from full tensors, for callers that have no blocks."""
    family = family_of(layout.config.hf_model_type)

    def shards(name: str, rank: int, size: int) -> Iterator[Tensor]:
        shard = family.tensor(name, layout.config).layout.shard(read(name), rank, size)
        yield dtypes.convert(shard, layout.dtype_of(name), name=name)

    return shards


def _lay_out(path: Path, layout: RankLayout, rank: int, stage: int, expert: int, iteration: int) -> OutFile:
    """A rank file with everything in it but the values of its tensors."""
    args = megatron_args.namespace(
        layout.config, tp=layout.tp, partition=layout.partition, legacy=layout.spelling == "legacy",
        dtype=layout.dtype, iteration=iteration, ep=layout.ep,
    )  # fmt: skip
    if not layout.complete:
        megatron_args.leave_open(args)
    chunks = layout.partition.chunks
    models: list[dict[str, Any]] = [{} for _ in range(chunks)]
    names: dict[int, str] = {}
    for spec, name, held_by, chunk in layout.places():
        if held_by != stage or expert not in layout.holders(name):
            continue
        tensor = torch.empty(layout.shard_shape(spec, rank), dtype=layout.dtype_of(spec.name))
        names[id(tensor)] = name
        first = expert * (layout.config.num_experts // layout.ep)
        local = renumbered(layout.partition.to_local(name, stage, chunk), -first)
        _put(models[chunk], local, tensor, layout.spelling, tied=layout.tied_copy)
    keys = ["model"] if chunks == 1 else [f"model{chunk}" for chunk in range(chunks)]
    document = {"args": args, "checkpoint_version": 3.0, "iteration": iteration, **dict(zip(keys, models, strict=True))}
    return torch_file(path, document, [(names[id(t)], t) for model in models for t in _leaves(model)])


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
