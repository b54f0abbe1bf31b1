"""The LoRA factors in Megatron rank files, as ModelLink's training saves them, seen as one adapter of full tensors.

Any tensor, pipeline and virtual pipeline layout, mcore and legacy names; with the base beside them (mcore) or without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta, base_fingerprint
from modellink_lora.checkpoint.names import TARGETS, mcore_target
from modellink_lora.checkpoint.rank_files import as_model
from modellink_lora.checkpoint.rank_tree import SIDECAR, RankTree, Shards, open_tree
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import Layout, Replicated, lora_layouts

ORIGIN, OWN = "ModelLink (rank files)", "this program's rank files"


def open_lora_rank_files(
    folder: Path, *, flag: str, base: Callable[[], ModelConfig] | None, given: Mapping[str, Any]
) -> Adapter:
    """The adapter in the `mp_rank_*` folders of `folder`.

    Args:
        base: dimensions of the model it is put on; where absent, those of the base in the same files.
        given: LoraConfig fields the user typed, for what old files do not say.
    Raises:
        UserError: no LoRA factors, files missing or damaged, factors and stored args disagree, alpha unknown.
    """
    tree = open_tree(folder, flag=flag)
    if not tree.holds_adapter:
        raise UserError(f"{flag} {folder}: holds a model without LoRA factors: give it to --load, not to {flag}")
    if tree.sidecars:
        return _own_adapter(tree)
    if base is not None:
        config = base()
    elif tree.holds_layers:
        config = as_model(tree, folder, tree.iteration, flag=flag).config
    else:
        raise UserError(f"{flag} {folder}: holds an adapter without its base, which tells how to cut it: "
                        "give the base checkpoint too")  # fmt: skip
    _check_layers(tree, config)
    layouts = _layouts(tree, config)
    shapes = {name: _full_shape(tree, name, layout) for name, layout in layouts.items()}
    lora, notes = _hyper_parameters(tree, shapes, given, flag)

    def read(name: str) -> Tensor:
        return _gather(tree, tree.lora, name, layouts[name])

    if tree.holds_layers:
        fingerprint = _fingerprint(tree, config)
    else:
        fingerprint = None
        notes += (f"{folder} holds copies of the embedding and the output layer; they are the base's and not read",)
    meta = AdapterMeta(lora, config, fingerprint, tree.iteration)
    return Adapter(folder, meta, shapes, ORIGIN, notes, read)


def _own_adapter(tree: RankTree) -> Adapter:
    """The adapter that this program wrote into the files, with what ModelLink's keys cannot say beside them."""
    broken = f"{tree.folder}: what is kept of the adapter in {SIDECAR} "
    if tree.sidecars.keys() != tree.lora.keys():
        raise UserError(f"{broken}is not in every file: they are of different checkpoints")
    try:
        documents = {sidecar["adapter"] for sidecar in tree.sidecars.values()}
        kept = {key: sidecar["stored"] for key, sidecar in tree.sidecars.items()}
        (document,) = documents
        meta = AdapterMeta.from_json(json.loads(document), where=f"{SIDECAR}.adapter")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{broken}is damaged or differs among the files ({error})") from None
    _check_layers(tree, meta.model)
    layouts = _layouts(tree, meta.model)
    shapes = {}
    for name, layout in layouts.items():
        common, (module, _, factor) = _full_shape(tree, name, layout), name.rpartition(".")
        r = meta.lora.rank_of(module)
        if common[factor == "lora_B"] < r:
            raise UserError(f"{broken}says rank {r} for {module}, {factor} has the shape {common}")
        shapes[name] = (r, common[1]) if factor == "lora_A" else (common[0], r)

    def stored(name: str) -> Tensor:
        exact, (_, _, factor) = name in kept[0, tree.stage_of(name)], name.rpartition(".")
        full = _gather(tree, kept if exact else tree.lora, name, layouts[name])
        r = shapes[name][factor == "lora_B"]
        return full if exact else (full[:r] if factor == "lora_A" else full[:, :r].contiguous())

    return Adapter(tree.folder, meta, shapes, OWN, (), stored)


def _gather(tree: RankTree, files: Shards, name: str, layout: Layout) -> Tensor:
    """The full tensor, after comparing the copies of one that is not cut."""
    try:
        shards = [files[rank, tree.stage_of(name)][name] for rank in range(tree.tp)]
    except KeyError:
        raise UserError(f"{tree.folder}: {name} is not on every tensor-parallel rank") from None
    if type(layout) is Replicated and not all(torch.equal(shard, shards[0]) for shard in shards):
        raise UserError(f"{tree.folder}: the tensor-parallel ranks hold different copies of {name}: the run that wrote "
                        "them was out of step, so there is no one adapter to read")  # fmt: skip
    return layout.gather(shards)


def _check_layers(tree: RankTree, config: ModelConfig) -> None:
    held = sum(tree.partition.counts)
    said = getattr(tree.args, "num_layers", None)
    if isinstance(said, int) and said != held:
        raise UserError(f"{tree.folder}: args say {said} layers, the files hold {held}")
    if held != config.num_layers:
        raise UserError(f"{tree.folder}: holds {held} layers, the base has {config.num_layers}: "
                        "the adapter belongs to another model")  # fmt: skip


def _layouts(tree: RankTree, config: ModelConfig) -> dict[str, Layout]:
    """Layout of every factor by global name; both factors must be on every tensor-parallel rank of their stage."""
    family = family_of(config.hf_model_type)
    layouts: dict[str, Layout] = {}
    for (rank, stage), factors in tree.lora.items():
        first = tree.lora[0, stage]
        if odd := sorted(factors.keys() ^ first.keys()):
            raise UserError(f"{tree.file(rank, stage)}: {odd[0]} is not on every tensor-parallel rank")
        for module in sorted({name.rpartition(".")[0] for name in factors}):
            pair = f"{module}.lora_A", f"{module}.lora_B"
            if missing := [name for name in pair if name not in factors]:
                raise UserError(f"{tree.file(rank, stage)}: lacks {missing[0]}, the other factor is there")
            try:
                if module.rsplit(".", 1)[-1] not in TARGETS:
                    raise KeyError(module)
                spec = family.tensor(f"{module}.weight", config)
            except KeyError:
                raise UserError(f"{tree.folder}: adapts {module}, which the base does not have") from None
            layouts.update(zip(pair, lora_layouts(spec.layout), strict=True))
    return layouts


def _full_shape(tree: RankTree, name: str, layout: Layout) -> tuple[int, ...]:
    stage = tree.stage_of(name)
    shapes = {tuple(tree.lora[rank, stage][name].shape) for rank in range(tree.tp)}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise UserError(f"{tree.folder}: {name} has the shapes {sorted(shapes)} on the tensor-parallel ranks")
    blank = torch.empty(shapes.pop(), device="meta")
    return tuple(layout.gather([blank] * tree.tp).shape)


def _hyper_parameters(
    tree: RankTree, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any], flag: str
) -> tuple[LoraConfig, tuple[str, ...]]:
    """What the stored args say, after comparing it with the tensors, and what the user should know about it."""
    args = tree.args or argparse.Namespace()
    ranks = {shapes[name][0] for name in shapes if name.endswith(".lora_A")}
    ranks |= {shape[1] for name, shape in shapes.items() if name.endswith(".lora_B")}
    if len(ranks) > 1:
        raise UserError(f"{tree.folder}: holds LoRA factors of ranks {', '.join(map(str, sorted(ranks)))}; "
                        "one rank is expected")  # fmt: skip
    r = ranks.pop()
    if (said := getattr(args, "lora_r", None)) not in (None, r):
        raise UserError(f"{tree.folder}: args say lora_r {said}, the LoRA factors have rank {r}")
    found = {name.rpartition(".")[0].rsplit(".", 1)[-1] for name in shapes}
    targets = tuple(name for name in TARGETS if name in found)
    if said := getattr(args, "lora_target_modules", None):
        known = {*TARGETS, *TARGETS.values()}
        if {mcore_target(str(name)) for name in said if name in known} != found:
            raise UserError(f"{tree.folder}: args say lora_target_modules {' '.join(map(str, said))}, "
                            f"the LoRA factors are those of {' '.join(targets)}")  # fmt: skip
    alpha = getattr(args, "lora_alpha", None)
    notes: tuple[str, ...] = ()
    if alpha is None:
        alpha = given.get("alpha")
        if alpha is None:
            raise UserError(f"{flag} {tree.folder} does not say its alpha (args hold no lora_alpha): "
                            "give the one it was trained with by --lora-alpha")  # fmt: skip
        notes = (f"{tree.folder} does not say its alpha: --lora-alpha {alpha:g} is taken on trust",)
    # fp32 factors stay so on a base of 16 bits, where 16-bit ones take the base's dtype
    wide = any(t.dtype == torch.float32 for factors in tree.lora.values() for t in factors.values())
    return LoraConfig(r, float(alpha), 0.0, targets, dtype="fp32" if wide else None), notes


def _fingerprint(tree: RankTree, config: ModelConfig) -> str | None:
    """Identity of the base beside the adapter; None where fp16 has changed the bits of a wider base."""
    family = family_of(config.hf_model_type)
    weights = tree.base[0, 0].values()
    if config.params_dtype != "fp16" and any(weight.dtype == torch.float16 for weight in weights):
        return None

    def read(name: str) -> Tensor:
        stage = tree.stage_of(name)
        try:
            shards = [tree.base[rank, stage][name] for rank in range(tree.tp)]
        except KeyError:
            raise UserError(f"{tree.folder}: lacks {name}, so the base beside the adapter is not whole") from None
        return family.tensor(name, config).layout.gather(shards)

    return base_fingerprint(config, read)
