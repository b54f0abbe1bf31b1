"""Megatron rank files as they lie on disk: which files, which spelling, which global layer, base and adapter apart.

`rank_files.py` makes a model of the base tensors, `lora_rank_files.py` an adapter of the LoRA factors.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modellink_lora.checkpoint.experts import count_experts, expert_of, renumbered, separate
from modellink_lora.checkpoint.megatron_args import check_args
from modellink_lora.checkpoint.names import from_legacy, from_module
from modellink_lora.checkpoint.unpickle import load_rank_file
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.family import TensorSpec
from modellink_lora.models.layouts import Layout
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
    ep: int = 1
    local_experts: int = 0  # of a layer in one file
    # (tp rank, stage, expert rank above 0) -> what it holds outside the experts: the same as rank 0
    copies: Mapping[tuple[int, int, int], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def holds_adapter(self) -> bool:
        return any(self.lora.values())

    @property
    def holds_layers(self) -> bool:
        """Whether the base's layers are there; ModelLink's legacy LoRA checkpoints leave them out."""
        return any(name.startswith("decoder.layers.") for names in self.base.values() for name in names)

    def file(self, rank: int, stage: int, name: str = "") -> Path:
        """The file that the tensor of this global name, or of any outside the experts, is read from."""
        expert = (expert_of(name) or 0) // max(1, self.local_experts)
        return rank_file(self.folder, rank, stage, self.partition.stages, expert, self.ep)

    def stage_of(self, name: str) -> int:
        """The stage whose layers or ends the tensor of this global name belongs to."""
        where = self.partition
        return next(p for p in range(where.stages) if any(where.holds(name, p, c) for c in range(where.chunks)))


def rank_file(folder: Path, rank: int, stage: int, stages: int, expert: int = 0, ep: int = 1) -> Path:
    """`mp_rank_TT`, then `_PPP` with several stages and `_EEE` with several expert-parallel ranks.

    Virtual stages share their stage's file.
    """
    name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "") + (f"_{expert:03d}" if ep > 1 else "")
    return folder / name / FILE


def check_spelling(config: ModelConfig, spelling: Spelling) -> None:
    """Raise UserError where a model has no names in this spelling."""
    if config.num_experts and spelling == "legacy":
        raise UserError("a mixture of experts has no legacy names: give --use-mcore-models, without --save-to-legacy")


def shard_shape(spec: TensorSpec, config: ModelConfig, rank: int, tp: int) -> torch.Size:
    """Raises ValueError when the tensor does not divide."""
    return _shard_shape(spec.layout, full_shape(spec.name, config), rank, tp)


@functools.lru_cache(maxsize=1024)  # experts are thousands of tensors of the same few shapes
def _shard_shape(layout: Layout, shape: tuple[int, ...], rank: int, tp: int) -> torch.Size:
    return layout.shard(torch.empty(shape, device="meta"), rank, tp).shape


def open_tree(folder: Path, *, flag: str) -> RankTree:
    """Open the rank files of one iteration's folder. Raises UserError when files are missing, damaged or mixed up."""
    files = _load_all(folder, flag)
    tp, stages, ep = (max(numbers) + 1 for numbers in zip(*files, strict=True))
    paths = {(rank, stage, expert): rank_file(folder, rank, stage, stages, expert, ep) for rank, stage, expert in files}
    chunks = {key: _chunks(file, paths[key]) for key, file in files.items()}
    count = len(chunks[0, 0, 0])
    if different := [key for key, models in chunks.items() if len(models) != count]:
        raise UserError(f"{paths[different[0]]}: holds other virtual stages than the first file")
    spelling: Spelling = "legacy" if "language_model" in chunks[0, 0, 0][0] else "mcore"
    dropped: dict[str, str] = {}
    local: dict[tuple[int, int, int], list[list[tuple[str, Tensor]]]] = {}
    for key, found in chunks.items():
        try:
            local[key] = [list(separate(list(_flatten(model, spelling, folder, dropped)), ep)) for model in found]
        except UserError as error:
            raise UserError(f"{paths[key]}: {str(error).removeprefix(f'{folder}: ')}") from None
    dropped |= {key: reason for key, reason in _TRAINING_STATE.items() if any(key in file for file in files.values())}
    counts = [_count_layers(local[0, run % stages, 0][run // stages]) for run in range(stages * count)]
    partition = Partition(tuple(counts), count)
    base: dict[tuple[int, int], dict[str, Tensor]] = {key[:2]: {} for key in files}
    lora: dict[tuple[int, int], dict[str, Tensor]] = {key[:2]: {} for key in files}
    copies: dict[tuple[int, int, int], dict[str, Tensor]] = {key: {} for key in files if key[2]}
    experts = {key: max(count_experts(name for name, _ in model) for model in models) for key, models in local.items()}
    each = max(experts.values())
    if odd := [key for key, number in experts.items() if number != each]:
        raise UserError(f"{paths[odd[0]]}: holds {experts[odd[0]]} experts of a layer, other files {each}")
    stripped = ""
    for (rank, stage, expert), models in sorted(local.items()):
        where = paths[rank, stage, expert]
        for chunk, tensors in enumerate(models):
            for name, tensor in tensors:
                factor = _FACTOR.fullmatch(name)
                if factor is None and ".lora_" in name:
                    raise UserError(
                        f"{where}: holds {name}; of LoRA tensors only "
                        "lora_A.default.weight and lora_B.default.weight are read"
                    )
                held, plain = (lora, ".".join(factor.groups())) if factor else (base, name.replace(".base_layer.", "."))
                stripped = stripped or (name if plain != name and not factor else "")
                plain = renumbered(partition.to_global(from_module(plain), stage, chunk), expert * each)
                copy = expert > 0 and expert_of(plain) is None
                into = copies[rank, stage, expert] if copy else held[rank, stage]
                if plain in into:
                    raise UserError(f"{where}: holds {plain} twice, with and without "
                                    "base_layer in its name: the file is mixed up")  # fmt: skip
                into[plain] = tensor
    if stripped and not any(lora.values()):
        raise UserError(f"{folder}: holds {stripped} but no LoRA factors: it is neither a base nor an adapter")
    if ep > 1:
        dropped["all but the experts, of expert-parallel ranks above 0"] = "copies of what rank 0 holds"
    args = files[0, 0, 0].get("args")
    tree = RankTree(
        folder, _number(files[0, 0, 0].get("iteration")), args if isinstance(args, argparse.Namespace) else None,
        tp, partition, spelling, base, lora, dropped,
        {key[:2]: file[SIDECAR] for key, file in files.items() if SIDECAR in file and not key[2]}, ep, each, copies,
    )  # fmt: skip
    _check_args_layout(tree)
    _check_copies(tree)
    return tree


def _load_all(folder: Path, flag: str) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Every rank file by (tp rank, stage, expert rank). Raises UserError when the set of folders has holes."""
    found: dict[tuple[int, ...], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = re.fullmatch(r"mp_rank_(\d{2})((?:_\d{3}){0,2})", path.name)
        if not match:
            raise UserError(f"{path}: unexpected folder name; expected mp_rank_TT, mp_rank_TT_PPP or ..._PPP_EEE")
        numbers = [match[1], *match[2].split("_")[1:]]
        found[tuple(map(int, numbers))] = path / FILE
    if not found:
        raise UserError(f"{flag} {folder}: holds no mp_rank_* folders (it is empty)")
    if len({len(numbers) for numbers in found}) > 1:
        raise UserError(f"{flag} {folder}: the names of its mp_rank_* folders have different numbers of parts: files "
                        "are mixed up")  # fmt: skip
    loaded = {numbers: load_rank_file(path) for numbers, path in found.items() if path.is_file()}
    for place, file in loaded.items():
        if isinstance(args := file.get("args"), argparse.Namespace):
            check_args(args, where=str(found[place]))
    by_expert = _second_is_expert(next(iter(loaded.values()), {}).get("args"))

    def key(numbers: tuple[int, ...]) -> tuple[int, int, int]:
        rank, second, third = (*numbers, 0, 0)[:3]
        return (rank, 0, second) if by_expert and len(numbers) == 2 else (rank, second, third)

    files = {key(numbers): path for numbers, path in found.items()}
    tp, stages, ep = (max(numbers) + 1 for numbers in zip(*files, strict=True))
    layout = f"{tp} x {stages} rank files (TP x PP)" if ep == 1 else f"{tp} x {stages} x {ep} rank files (TP x PP x EP)"
    for place in itertools.product(range(tp), range(stages), range(ep)):
        if place not in files or not files[place].is_file():
            rank, stage, expert = place
            missing = files.get(place, rank_file(folder, rank, stage, stages, expert, ep))
            raise UserError(f"{missing} is missing: {folder} should hold {layout}")
    return {key(numbers): file for numbers, file in loaded.items()}


def _second_is_expert(args: Any) -> bool:
    """Whether the second number of a folder's name counts expert-parallel ranks; with several stages it does not."""
    return (getattr(args, "expert_model_parallel_size", 1) or 1) > 1 and (
        getattr(args, "pipeline_model_parallel_size", 1) or 1
    ) == 1


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
    layout = (("tensor_model_parallel_size", tree.tp), ("pipeline_model_parallel_size", tree.partition.stages),
              ("expert_model_parallel_size", tree.ep))  # fmt: skip
    for name, found in layout:
        said = getattr(args, name, None) or (1 if name.startswith("expert") else found)
        if said != found:
            raise UserError(
                f"{tree.folder}: args say {name} {said}, the rank folders make it {found}: files are missing or mixed"
            )


def _check_copies(tree: RankTree) -> None:
    """That expert-parallel ranks hold the same tensors outside the experts: by names, shapes and some rows."""
    for (rank, stage, expert), held in tree.copies.items():
        first = {**tree.base[rank, stage], **tree.lora[rank, stage]}
        first = {name: tensor for name, tensor in first.items() if expert_of(name) is None}
        odd = sorted(held.keys() ^ first.keys()) or [name for name in held if not _alike(held[name], first[name])]
        if odd:
            where = rank_file(tree.folder, rank, stage, tree.partition.stages, expert, tree.ep)
            raise UserError(f"{where}: {odd[0]} is not that of expert-parallel rank 0: files are mixed up")


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) if a.dim() < 2 else torch.equal(a[:1], b[:1]) and torch.equal(a[-1:], b[-1:])
