"""Models that today's Megatron-LM and Megatron-Bridge save in torch_dist folders, under our names.

Layers lie stacked along a first axis [L, ...] or one by one; Transformer Engine's linears hold the norm before them;
gate and up may be two tensors. Megatron-LM keeps its args in `common.pt` or, since megatron-core 0.19, among the
tensors; Megatron-Bridge in `run_config.yaml`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.rank_files import RankFiles, as_model, open_rank_files
from modellink_lora.checkpoint.rank_tree import RankTree
from modellink_lora.checkpoint.store import TRACKER, newest
from modellink_lora.checkpoint.stored import Stored
from modellink_lora.checkpoint.torch_dist import COMMON, TorchDist, is_torch_dist, open_torch_dist
from modellink_lora.config.document import parse_yaml, read_text
from modellink_lora.config.errors import UserError
from modellink_lora.parallel.partition import Partition

RUN_CONFIG = "run_config.yaml"
ADAPTER = ".adapter."  # in the name of what Megatron-Bridge adds to a linear
_NORMS = {  # Transformer Engine's linear -> the norm that it holds
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of ours lies: stored tensors to be joined one below the other, each whole or one layer of it."""

    keys: tuple[str, ...]
    row: int | None


Places = Mapping[str, Place]


@dataclasses.dataclass(frozen=True)
class DistFiles(RankFiles):
    """A torch_dist checkpoint as one process would have written it."""

    source: TorchDist | None = None
    places: Places = dataclasses.field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        assert self.source is not None
        return read_place(self.source, self.places[name])

    @property
    def dropped(self) -> Mapping[str, str]:
        adapter = {"*.adapter.*": "an adapter beside the base"} if any(ADAPTER in name for name in self.places) else {}
        return {**self._tree.dropped, **adapter}

    def held(self) -> Iterator[str]:
        for name in self.places:
            if ADAPTER not in name:
                yield from self.keys(name)

    def keys(self, name: str) -> tuple[str, ...]:
        place = self.places[name]
        return tuple(key if place.row is None else f"{key}[{place.row}]" for key in place.keys)

    def stored(self, name: str) -> Stored:
        """The tensor is one part: its pieces on disk may be cut in any way."""
        return Stored([self.read(name)], self.family.tensor(name, self.config).layout, lambda parts: parts[0])

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        return self.family.tensor(name, self.config).layout.shard(self.read(name), rank, size)


def dist_folder(root: Path, *, flag: str) -> Path | None:
    """The torch_dist folder that `root` names, itself or by its tracker; None if it is of another kind."""
    if is_torch_dist(root):
        return root
    if (root / TRACKER).is_file() and is_torch_dist(folder := newest(root, flag=flag)):
        return folder
    return None


def open_megatron(root: Path, *, flag: str = "--load", model_flags: Mapping[str, Any] | None = None) -> RankFiles:
    """The newest checkpoint below `root`: rank files, or a torch_dist folder, which `root` may also be itself."""
    folder = dist_folder(root, flag=flag)
    if folder is None:
        return open_rank_files(root, flag=flag, model_flags=model_flags)
    return open_dist_model(root, folder, flag=flag, model_flags=model_flags)


def open_dist_model(
    root: Path, folder: Path, *, flag: str = "--load", model_flags: Mapping[str, Any] | None = None
) -> RankFiles:
    """The base model in `folder`, which `root` names. Raises UserError as `open_rank_files` does."""
    source = open_torch_dist(folder)
    if any(".mlp.experts." in name or ".mlp.router." in name for name in source.entries):
        raise UserError(
            f"{flag} {folder}: holds a mixture of experts in a torch_dist folder, which is not read: save it with "
            "--ckpt-format torch"
        )
    places = places_of(source)
    base = {name: place for name, place in places.items() if ADAPTER not in name}
    if not any(name.startswith("decoder.layers.") for name in base):
        raise UserError(f"{flag} {root}: holds an adapter without the layers of its base: give the base to {flag} and "
                        "this folder to --lora-load")  # fmt: skip
    args, iteration = args_of(source)
    if args is None:
        raise UserError(f"{flag} {folder}: holds neither args in {COMMON} nor {RUN_CONFIG}, so the model's dimensions "
                        "are unknown")  # fmt: skip
    tensors = {name: blank(source, place) for name, place in base.items()}
    if not hasattr(args, "untie_embeddings_and_output_weights"):
        args.untie_embeddings_and_output_weights = "output_layer.weight" in tensors
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers."))
    tree = RankTree(
        folder, iteration, args, 1, Partition((layers,)), "mcore", {(0, 0): tensors}, {(0, 0): {}},
        source.dropped,
    )  # fmt: skip
    seen = as_model(tree, root, iteration, flag=flag, model_flags=model_flags)
    fields = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
    return DistFiles(**fields, source=source, places=places)


def places_of(source: TorchDist) -> dict[str, Place]:
    """Global mcore name of every stored tensor -> where it lies. Adapters keep their own spelling."""
    found: dict[str, dict[int, tuple[str, int | None]]] = {}
    for key in source.entries:
        if not source.entries[key].shape:
            raise UserError(f"{source.folder}: {key} is said to have no dimensions: the folder is damaged")
        name, half = _ours(key), 0
        if name.endswith((".weight_w", ".weight_v")):
            name, half = name[:-2], int(name.endswith("_v"))  # gate and up, each for itself
        for index, row in _layers(name, source.entries[key].shape):
            found.setdefault(index, {})[half] = (key, row)
    return {name: Place(tuple(key for _, (key, _) in sorted(parts.items())), parts[min(parts)][1])
            for name, parts in found.items()}  # fmt: skip


def _ours(key: str) -> str:
    name = key[key.index("decoder.layers.") :] if "decoder.layers." in key else key.removeprefix("module.")
    for theirs, norm in _NORMS.items():
        name = name.replace(theirs, norm)
    return name


def _layers(name: str, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
    """(global name, row) of each layer that is stacked in a stored tensor; itself if none are."""
    head, _, rest = name.partition("decoder.layers.")
    if head or not rest or rest.split(".", 1)[0].isdigit():
        return [(name, None)]
    return [(f"decoder.layers.{layer}.{rest}", layer) for layer in range(shape[0])]


def read_place(source: TorchDist, place: Place) -> Tensor:
    parts = [source.read(key, place.row) for key in place.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def blank(source: TorchDist, place: Place) -> Tensor:
    """A tensor of the shape and dtype of the one at `place`, without memory."""
    entries = [source.entries[key] for key in place.keys]
    shapes = [entry.shape if place.row is None else entry.shape[1:] for entry in entries]
    if not all(shapes):
        raise UserError(f"{source.folder}: {place.keys[0]} has one dimension, expected one of layers and others")
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return torch.empty(shape, dtype=entries[0].dtype, device="meta")


def run_settings(folder: Path) -> Mapping[str, Any]:
    """What Megatron-Bridge says about the run; empty for Megatron-LM's folders."""
    path = folder / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        document = parse_yaml(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping")
    return document


def args_of(source: TorchDist) -> tuple[argparse.Namespace | None, int]:
    """(args in Megatron-LM's spelling, iteration)"""
    common, folder = source.load_common(), source.folder
    number = common.get("iteration")
    match = re.fullmatch(r"iter_(\d{7})", folder.name)
    iteration = number if isinstance(number, int) else int(match.group(1)) if match else 0
    model = run_settings(folder).get("model")
    if isinstance(model, dict):
        return _from_bridge(model), iteration
    args = common.get("args")
    return argparse.Namespace(**vars(args)) if isinstance(args, argparse.Namespace) else None, iteration


def _from_bridge(model: Mapping[str, Any]) -> argparse.Namespace:
    """The model section of run_config.yaml, in the spelling of Megatron-LM's args."""
    values = {name: value for name, value in model.items() if isinstance(value, (bool, int, float, str))}
    values["swiglu"] = values.pop("gated_linear_unit", False)
    if "share_embeddings_and_output_weights" in values:
        values["untie_embeddings_and_output_weights"] = not values.pop("share_embeddings_and_output_weights")
    if "seq_length" in values:
        values.setdefault("max_position_embeddings", values["seq_length"])
    values["use_rope_scaling"] = bool(values.pop("rope_scaling", False))
    return argparse.Namespace(**values)
