"""Megatron rank files as they lie on disk: which files, which spelling, which global layer, base and adapter apart.

`rank_files.py` makes a model of the base tensors, `lora_rank_files.py` an adapter of the LoRA factors.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modellink_lora.checkpoint.names import from_legacy
from modellink_lora.checkpoint.unpickle import load_rank_file
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.family import TensorSpec
from modellink_lora.models.shapes import full_shape
from modellink_lora.parallel.partition import Partition

FILE = "model_optim_rng.pt"
SIDECAR = "modellink_lora"  # key beside `model` in rank files that hold an adapter of this program
HF_FILES = "hf"  # folder below the checkpoint's root with config.json and tokenizer of the source model
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
Spelling = Literal["mcore", "legacy"]
Shards = Mapping[tuple[int, int], dict[str, Tensor]]  # (tp rank, stage) -> global name -> shard
_DERIVED = re.compile(r"(_extra_state|inv_freq)$")
_DERIVED_REASONS = {
    "_extra_state": "scaling state of fp8 kernels, empty here",
    "inv_freq": "rotary frequencies, which follow from the settings",
}
_TRAINING_STATE = {
    "optimizer": "state of the optimizer, which a converted model does not need",
    "opt_param_scheduler": "state of the schedule, which a converted model does not need",
    "rng_state": "random states, which a converted model does not need",
}
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.default\.weight")


@dataclass(frozen=True)
class RankTree:
    """Every tensor of one checkpoint folder by global mcore name. Tensors stay on disk until read."""

    folder: Path
    iteration: int
    args: argparse.Namespace | None
    tp: int
    partition: Partition
    spelling: Spelling
    base: Shards  # `.base_layer.` taken out of the names
    lora: Shards  # `<global module>.lora_A`, `.lora_B`
    dropped: Mapping[str, str] = field(default_factory=dict)  # what is there and not used -> why
    sidecars: Mapping[tuple[int, int], Any] = field(default_factory=dict)  # of this program's adapters

    @property
    def holds_adapter(self) -> bool:
        return any(self.lora.values())

    @property
    def holds_layers(self) -> bool:
        """Whether the base's layers are there; ModelLink's legacy LoRA checkpoints leave them out."""
        return any(name.startswith("decoder.layers.") for names in self.base.values() for name in names)

    def file(self, rank: int, stage: int) -> Path:
        return rank_file(self.folder, rank, stage, self.partition.stages)

    def stage_of(self, name: str) -> int:
        """The stage whose layers or ends the tensor of this global name belongs to."""
        where = self.partition
        return next(p for p in range(where.stages) if any(where.holds(name, p, c) for c in range(where.chunks)))


def rank_file(folder: Path, rank: int, stage: int, stages: int) -> Path:
    """`mp_rank_TT` with one stage, `mp_rank_TT_PPP` with several; virtual stages share their stage's file."""
    return folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")) / FILE


def shard_shape(spec: TensorSpec, config: ModelConfig, rank: int, tp: int) -> torch.Size:
    """Raises ValueError when the tensor does not divide."""
    return spec.layout.shard(torch.empty(full_shape(spec.name, config), device="meta"), rank, tp).shape


def open_tree(folder: Path, *, flag: str) -> RankTree:
    """Open the rank files of one iteration's folder. Raises UserError when files are missing, damaged or mixed up."""
    files = _load_all(folder, flag)
    tp, stages = max(rank for rank, _ in files) + 1, max(stage for _, stage in files) + 1
    chunks = {key: _chunks(file, rank_file(folder, *key, stages)) for key, file in files.items()}
    count = len(chunks[0, 0])
    if different := [key for key, held in chunks.items() if len(held) != count]:
        raise UserError(f"{rank_file(folder, *different[0], stages)}: holds other virtual stages than the first file")
    spelling: Spelling = "legacy" if "language_model" in chunks[0, 0][0] else "mcore"
    dropped: dict[str, str] = {}
    local = {key: [list(_flatten(model, spelling, folder, dropped)) for model in held] for key, held in chunks.items()}
    dropped |= {key: reason for key, reason in _TRAINING_STATE.items() if any(key in file for file in files.values())}
    counts = [_count_layers(local[0, run % stages][run // stages]) for run in range(stages * count)]
    partition = Partition(tuple(counts), count)
    base: dict[tuple[int, int], dict[str, Tensor]] = {key: {} for key in files}
    lora: dict[tuple[int, int], dict[str, Tensor]] = {key: {} for key in files}
    stripped = ""
    for (rank, stage), models in local.items():
        for chunk, tensors in enumerate(models):
            for name, tensor in tensors:
                factor = _FACTOR.fullmatch(name)
                if factor is None and ".lora_" in name:
                    raise UserError(
                        f"{rank_file(folder, rank, stage, stages)}: holds {name}; of LoRA tensors only "
                        "lora_A.default.weight and lora_B.default.weight are read"
                    )
                held, plain = (lora, ".".join(factor.groups())) if factor else (base, name.replace(".base_layer.", "."))
                stripped = stripped or (name if plain != name and not factor else "")
                plain = partition.to_global(plain, stage, chunk)
                if plain in held[rank, stage]:
                    raise UserError(f"{rank_file(folder, rank, stage, stages)}: holds {plain} twice, with and without "
                                    "base_layer in its name: the file is mixed up")  # fmt: skip
                held[rank, stage][plain] = tensor
    if stripped and not any(lora.values()):
        raise UserError(f"{folder}: holds {stripped} but no LoRA factors: it is neither a base nor an adapter")
    args = files[0, 0].get("args")
    tree = RankTree(
        folder, _number(files[0, 0].get("iteration")), args if isinstance(args, argparse.Namespace) else None,
        tp, partition, spelling, base, lora, dropped,
        {key: file[SIDECAR] for key, file in files.items() if SIDECAR in file},
    )  # fmt: skip
    _check_args_layout(tree)
    return tree


def _load_all(folder: Path, flag: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Every rank file by (tp rank, stage). Raises UserError when the set of folders has holes."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?", path.name)
        if not match:
            raise UserError(f"{path}: unexpected folder name; expected mp_rank_TT or mp_rank_TT_PPP")
        if match.group(3):
            raise UserError(f"{path}: expert-parallel checkpoints are not supported in this version")
        found[int(match.group(1)), int(match.group(2) or 0)] = path / FILE
    if not found:
        raise UserError(f"{flag} {folder}: holds no mp_rank_* folders (it is empty)")
    tp, stages = max(rank for rank, _ in found) + 1, max(stage for _, stage in found) + 1
    for rank in range(tp):
        for stage in range(stages):
            if (rank, stage) not in found or not found[rank, stage].is_file():
                missing = found.get((rank, stage), rank_file(folder, rank, stage, stages))
                raise UserError(f"{missing} is missing: {folder} should hold {tp} x {stages} rank files (TP x PP)")
    return {key: load_rank_file(path) for key, path in found.items()}


def _chunks(file: dict[str, Any], where: Path) -> list[dict[str, Any]]:
    """The model of each virtual stage: `model`, or `model0`, `model1`, ..."""
    numbers = sorted(int(match.group(1)) for key in file if (match := re.fullmatch(r"model(\d+)", str(key))))
    if numbers and ("model" in file or numbers != list(range(len(numbers)))):
        raise UserError(f"{where}: holds {', '.join(key for key in file if str(key).startswith('model'))}: mixed up")
    models = [file[f"model{n}"] for n in numbers] or [file.get("model")]
    if not all(isinstance(model, dict) for model in models):
        raise UserError(f"{where}: holds no model, only {', '.join(map(str, file))}")
    return models


def _flatten(
    model: Mapping[str, Any], spelling: Spelling, folder: Path, dropped: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """(local mcore name, tensor) of one model; derived buffers go to `dropped`, anything unknown is refused."""
    for path, value in _leaves(model, ()):
        name = ".".join(path)
        if derived := _DERIVED.search(name):
            dropped["*." + derived[1]] = _DERIVED_REASONS[derived[1]]
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{folder}: {name} is a {type(value).__name__}, expected a tensor")
        if spelling == "legacy":
            try:
                name = from_legacy(path)
            except (KeyError, ValueError):
                raise UserError(f"{folder}: tensor {name} belongs to no supported model") from None
        yield name, value


def _leaves(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _count_layers(tensors: list[tuple[str, Tensor]]) -> int:
    indices = {int(match.group(1)) for name, _ in tensors if (match := re.match(r"decoder\.layers\.(\d+)\.", name))}
    return max(indices, default=-1) + 1


def _number(iteration: Any) -> int:
    return iteration if isinstance(iteration, int) and not isinstance(iteration, bool) else 0


def _check_args_layout(tree: RankTree) -> None:
    args = tree.args or argparse.Namespace()
    layout = (("tensor_model_parallel_size", tree.tp), ("pipeline_model_parallel_size", tree.partition.stages))
    for name, found in layout:
        said = getattr(args, name, found)
        if said != found:
            raise UserError(
                f"{tree.folder}: args say {name} {said}, the rank folders make it {found}: files are missing or mixed"
            )
    if (getattr(args, "expert_model_parallel_size", 1) or 1) > 1 or getattr(args, "num_experts", None):
        raise UserError(f"{tree.folder}: is a mixture-of-experts checkpoint: not supported in this version")
