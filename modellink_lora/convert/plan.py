"""What a conversion will do, as a value that can be printed before anything is written. Pure: no file is touched."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from modellink_lora.checkpoint.dtypes import widest
from modellink_lora.checkpoint.experts import check_expert_parallel
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig, pad_vocab
from modellink_lora.models.family import Family, TensorSpec
from modellink_lora.models.shapes import full_shape
from modellink_lora.parallel.partition import Partition

BLOCK_BYTES = 4 << 20  # of a tensor of the result in memory at a time


@dataclass(frozen=True)
class Move:
    """One Megatron tensor on its way: what it is made of and whether an adapter is folded in."""

    spec: TensorSpec
    shape: tuple[int, ...]  # of the result, on one process
    rank: int | None  # LoRA rank of the adapter merged into it
    dtypes: tuple[torch.dtype, ...]  # of each Hugging Face tensor it becomes
    sources: tuple[str, ...] = ()  # stored tensors it is made of
    targets: tuple[str, ...] = ()  # where it is written

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor as one, which holds every value of its parts."""
        return widest(self.dtypes)

    @property
    def module(self) -> str:
        return self.spec.name.rpartition(".")[0]


@dataclass(frozen=True)
class Plan:
    """An ordered list of moves and the layout of the result."""

    title: str
    config: ModelConfig  # of the result
    dtype: torch.dtype  # of the embedding; other tensors have their own
    tp: int
    partition: Partition
    moves: tuple[Move, ...]
    total_bytes: int  # of the tensors written, copies of a tied embedding included
    memory: int  # bytes held at most, beyond the program itself
    dropped: Mapping[str, str]  # things of the source that are not used -> why
    ep: int = 1

    def move(self, name: str) -> Move:
        """The move of the tensor of global name `name`."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Move]:
        return {move.spec.name: move for move in self.moves}

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Global name -> dtype of each tensor."""
        return {move.spec.name: move.dtype for move in self.moves}

    def table(self) -> str:
        """One line per kind of tensor, for people."""
        kinds: dict[str, list[Move]] = {}
        for move in self.moves:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", move.spec.name), []).append(move)
        rows = [("tensor", "count", "shape", "over TP", "adapter")]
        for kind, moves in kinds.items():
            merged = f"+ rank {moves[0].rank}" if moves[0].rank else ""
            if 0 < sum(move.rank is not None for move in moves) < len(moves):
                merged = "+ in some layers"
            layout = type(moves[0].spec.layout).__name__
            rows.append((kind, str(len(moves)), str(list(moves[0].shape)), layout, merged))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        body = [
            "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        kept = Counter(str(dtype).removeprefix("torch.") for dtype in self.dtypes.values())
        types = ", ".join(kept if len(kept) == 1 else (f"{name} of {count}" for name, count in kept.most_common()))
        total = f"  {len(self.moves)} tensors, {self.config.parameter_count():,} parameters, {types}"
        layout = f"TP {self.tp}, layers per stage {self.partition.describe()}" + f", EP {self.ep}" * (self.ep > 1)
        lines = [self.title, *body, f"{total}, {layout}"]
        lines += [f"  not used: {what} ({reason})" for what, reason in self._dropped_kinds().items()]
        return "\n".join([*lines, f"  {size(self.total_bytes)} to write, about {size(self.memory)} of memory"])

    def every_move(self) -> str:
        """One line per tensor in the order of writing, for people who want to know exactly."""
        lines = []
        for number, move in enumerate(self.moves, 1):
            bytes_ = torch.Size(move.shape).numel() * move.dtype.itemsize
            merged = f", + rank {move.rank}" if move.rank else ""
            what = f"{list(move.shape)} {size(bytes_)}, {type(move.spec.layout).__name__}{merged}"
            lines.append(f"  {number:4}  {move.spec.name}  {what}")
            lines.append(f"        {_listed(move.sources)} -> {_listed(move.targets)}")
        return "\n".join(lines)

    def _dropped_kinds(self) -> dict[str, str]:
        return {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in self.dropped.items()}


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, ... ({len(names)} in all)"


def make_plan(
    title: str,
    family: Family,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    dtypes: Callable[[TensorSpec], tuple[torch.dtype, ...]],
    tp: int,
    partition: Partition,
    ranks: Mapping[str, int],
    targets: Callable[[TensorSpec], tuple[str, ...]] = lambda spec: (),
    sources: Callable[[str], tuple[str, ...]] = lambda name: (),
    dropped: Mapping[str, str] | None = None,
    total_bytes: int = 0,
    workers: int = 1,
    ep: int = 1,
) -> Plan:
    """The plan of writing a model of `config`.

    Args:
        ranks: adapted module -> LoRA rank, from `adapted_ranks`.
        dtype: of the embedding; `dtypes` of each Hugging Face tensor that a tensor becomes.
        targets, sources: names of the tensors that each one is written to and made of.
        dropped: things of the source that are not used -> why.
    """
    moves = tuple(
        Move(
            spec,
            full_shape(spec.name, config),
            ranks.get(spec.name.removesuffix(".weight")),
            dtypes(spec),
            sources(spec.name),
            targets(spec),
        )
        for spec in family.tensors(config)
    )
    largest = max(torch.Size(move.shape).numel() * move.dtype.itemsize for move in moves)
    # with an adapter its base's identity is compared, for which one tensor at a time is put together
    memory = workers * (max(map(job_memory, moves))) + (largest if ranks else 0)
    return Plan(title, config, dtype, tp, partition, moves, total_bytes, memory, dropped or {}, ep)


def job_memory(move: Move) -> int:
    """Bytes that a thread at work on `move` holds at most: some blocks, and the adapter's factors in fp64."""
    factors = (move.rank or 0) * sum(move.shape[:2]) * 8 * 2
    return 4 * BLOCK_BYTES + factors


def padded(config: ModelConfig, tp: int, divisible_by: int | None) -> ModelConfig:
    """`config` with the vocabulary padded for `tp`: as asked for, else left alone where that still divides."""
    multiple = divisible_by or config.make_vocab_size_divisible_by
    rows = config.padded_vocab_size
    if divisible_by is not None or rows % tp:
        rows = pad_vocab(config.vocab_size, multiple * tp)
    return dataclasses.replace(config, padded_vocab_size=rows, make_vocab_size_divisible_by=multiple)


def check_layout(config: ModelConfig, tp: int, ep: int = 1) -> None:
    """Raise UserError when heads, groups or ffn rows do not divide over `tp` processes, or experts over `ep`."""
    for what, size in config.widths_cut_by_tp.items():
        if size % tp:
            raise UserError(f"--target-tensor-parallel-size {tp} does not divide the {size} {what} of this model")
    check_expert_parallel(config, ep)


def adapted_ranks(
    family: Family, config: ModelConfig, lora: LoraConfig, shapes: Mapping[str, Sequence[int]], *, where: str
) -> dict[str, int]:
    """Module -> LoRA rank of an adapter's tensors. Raises UserError where one does not fit the base."""
    names = {spec.name for spec in family.tensors(config)}
    ranks = {}
    for name, a in shapes.items():
        module, _, factor = name.rpartition(".")
        if factor != "lora_A":
            continue
        if f"{module}.weight" not in names:
            raise UserError(f"{where}: adapts {module}, which the base model does not have")
        out_features, in_features = full_shape(f"{module}.weight", config)
        b = shapes[f"{module}.lora_B"]
        if a[1] != in_features or b[0] != out_features:
            raise UserError(
                f"{where}: {module} has lora_A {list(a)} and lora_B {list(b)}, the base's weight is "
                f"{[out_features, in_features]}: the adapter belongs to another model"
            )
        ranks[module] = lora.rank_of(module)
    return ranks
