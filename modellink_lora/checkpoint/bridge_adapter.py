"""Adapters that Megatron-Bridge saves in torch_dist folders: its LoRA, and its CanonicalLoRA of separate projections.

`linear_in` is lora_A [r, in] and `linear_out` is lora_B [out, r], full whatever the layout that wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta
from modellink_lora.checkpoint.dtypes import dtype_name
from modellink_lora.checkpoint.megatron_dist import (
    ADAPTER,
    RUN_CONFIG,
    Place,
    args_of,
    blank,
    open_dist_model,
    places_of,
    read_place,
    run_settings,
)  # fmt: skip
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.checkpoint.peft import settings_of
from modellink_lora.checkpoint.projections import Part, assemble
from modellink_lora.checkpoint.torch_dist import TorchDist, open_torch_dist
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.shapes import full_shape

ORIGIN = "Megatron-Bridge"
_FACTOR = re.compile(r"(.+)\.adapter\.(?:(adapter_[a-z]+)\.)?(linear_in|linear_out)\.weight")
# parts of CanonicalLoRA in the order of the fused weight
_PARTS = {"linear_qkv": ("adapter_q", "adapter_k", "adapter_v"), "linear_fc1": ("adapter_gate", "adapter_up")}
Found = Mapping[str, Mapping[tuple[str | None, str], Place]]  # module -> (part of CanonicalLoRA, A or B) -> place


def open_bridge_adapter(
    folder: Path, *, flag: str, base: Callable[[], ModelConfig] | None, given: Mapping[str, Any]
) -> Adapter:
    """The adapter in `folder`.

    Args:
        base: dimensions of the model it is put on; where absent, those of the base in the same folder.
        given: LoraConfig fields the user typed, for what the folder may not say.
    Raises:
        UserError: no adapter or one of another kind, tensors that do not fit, alpha unknown.
    """
    source = open_torch_dist(folder)
    places = places_of(source)
    found = _factors(folder, places)
    if not found:
        raise UserError(f"{flag} {folder}: holds a model without LoRA factors: give it to --load, not to {flag}")
    if base is not None:
        config = base()
    elif any(name.startswith("decoder.layers.") and ADAPTER not in name for name in places):
        config = open_dist_model(folder, folder, flag=flag).config
    else:
        raise UserError(f"{flag} {folder}: holds an adapter without its base, which tells how to cut it: "
                        "give the base checkpoint too")  # fmt: skip
    alpha, said, notes = _alpha(folder, given, flag)
    _, iteration = args_of(source)
    _check_layers(folder, found, config)
    if any(part is not None for factors in found.values() for part, _ in factors):
        parts = {module: _canonical(source, module, held, config, alpha) for module, held in found.items()}
        return _assembled(source, parts, found, config, alpha, iteration, notes)
    shapes, kinds = {}, set()
    for module, factors in found.items():
        for factor in "AB":
            tensor = blank(source, factors[None, factor])
            shapes[f"{module}.lora_{factor}"] = tuple(tensor.shape)
            kinds.add(dtype_name(tensor.dtype, where=str(folder)))
    ranks = {module: shapes[f"{module}.lora_A"][0] for module in found}
    _check_shapes(folder, shapes, ranks, config, said)
    targets = tuple(name for name in TARGETS if name in {module.rsplit(".", 1)[-1] for module in found})
    r = next(iter(ranks.values()))
    lora = LoraConfig(r, alpha, 0.0, targets, dtype="fp32" if "fp32" in kinds else None)

    def read(name: str) -> Tensor:
        module, _, factor = name.rpartition(".")
        return read_place(source, found[module][None, factor[-1]])

    return Adapter(folder, AdapterMeta(lora, config, None, iteration), shapes, ORIGIN, notes, read)


def _factors(folder: Path, places: Mapping[str, Place]) -> dict[str, dict[tuple[str | None, str], Place]]:
    found: dict[str, dict[tuple[str | None, str], Place]] = {}
    for name, place in places.items():
        if ADAPTER not in name:
            continue
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise UserError(f"{folder}: holds {name}; of Megatron-Bridge's adapters LoRA and CanonicalLoRA are read")
        module, part, kind = match.groups()
        leaf = module.rsplit(".", 1)[-1]
        if leaf not in TARGETS or (part is not None and part not in _PARTS.get(leaf, ())):
            raise UserError(f"{folder}: adapts {name}, which is not among the linears that can be adapted here")
        found.setdefault(module, {})[part, "A" if kind == "linear_in" else "B"] = place
    for module, factors in found.items():
        for part, factor in factors:
            other = "B" if factor == "A" else "A"
            if (part, other) not in factors:
                raise UserError(f"{folder}: {module} has only one of the factors linear_in and linear_out")
    return found


def _check_layers(folder: Path, found: Found, config: ModelConfig) -> None:
    """That every layer of the base has the factors that any layer has."""
    names = {spec.name for spec in family_of(config.hf_model_type).tensors(config)}
    held = {(module, *key) for module, factors in found.items() for key in factors}
    for module, part, letter in sorted(held, key=str):
        for layer in range(config.num_layers):
            other = re.sub(r"^decoder\.layers\.\d+", f"decoder.layers.{layer}", module)
            if f"{other}.weight" in names and (other, part, letter) not in held:
                what = f"{part}.linear_{'in' if letter == 'A' else 'out'}" if part else "factors"
                raise UserError(f"{folder}: lacks the {what} of {other}, which {module} has: an adapter on some layers "
                                "only is not supported")  # fmt: skip


def _alpha(folder: Path, given: Mapping[str, Any], flag: str) -> tuple[float, int | None, tuple[str, ...]]:
    """(alpha, rank said, notes)"""
    settings = run_settings(folder).get("peft")
    if isinstance(settings, dict) and isinstance(settings.get("alpha"), (int, float)):
        return float(settings["alpha"]), settings.get("dim"), ()
    if "alpha" not in given:
        raise UserError(f"{flag} {folder} does not say its alpha ({RUN_CONFIG} has no peft section): "
                        "give the one it was trained with by --lora-alpha")  # fmt: skip
    alpha = float(given["alpha"])
    return alpha, None, (f"{folder} does not say its alpha: --lora-alpha {alpha:g} is taken on trust",)


def _check_shapes(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int], config: ModelConfig, said: int | None
) -> None:
    names = {spec.name for spec in family_of(config.hf_model_type).tensors(config)}
    for module, r in ranks.items():
        if f"{module}.weight" not in names:
            raise UserError(f"{folder}: adapts {module}, which the base does not have")
        out_features, in_features = full_shape(f"{module}.weight", config)
        a, b = shapes[f"{module}.lora_A"], shapes[f"{module}.lora_B"]
        if a != (r, in_features) or b != (out_features, r):
            raise UserError(f"{folder}: {module} has linear_in {a} and linear_out {b}, the base's weight is "
                            f"({out_features}, {in_features}): the adapter belongs to another model")  # fmt: skip
        if r != said and said is not None:
            raise UserError(f"{folder}: {RUN_CONFIG} says dim {said}, {module} has rank {r}")
    if len(set(ranks.values())) > 1:
        raise UserError(f"{folder}: holds LoRA factors of several ranks; one rank is expected")


def _canonical(
    source: TorchDist, module: str, factors: Mapping[tuple[str | None, str], Place], config: ModelConfig, alpha: float
) -> list[Part | None]:
    """What CanonicalLoRA has of each projection of `module`."""
    try:
        spec = family_of(config.hf_model_type).tensor(f"{module}.weight", config)
    except KeyError:
        raise UserError(f"{source.folder}: adapts {module}, which the base does not have") from None
    pieces = spec.layout.split(torch.empty(full_shape(spec.name, config), device="meta"))
    names = _PARTS.get(module.rsplit(".", 1)[-1], (None,))
    if len(names) != len(spec.hf):
        raise UserError(f"{source.folder}: CanonicalLoRA adapts {' '.join(map(str, names))} of {module}, which are one "
                        f"tensor in a {config.hf_model_type} model: not supported")  # fmt: skip
    parts: list[Part | None] = []
    for kind, hf, piece in zip(names, spec.hf, pieces, strict=True):
        if (kind, "A") not in factors:
            parts.append(None)
            continue
        a, b = (blank(source, factors[kind, factor]) for factor in "AB")
        if (b.shape[0], a.shape[1]) != tuple(piece.shape) or a.shape[0] != b.shape[1]:
            raise UserError(f"{source.folder}: {hf} has linear_in {tuple(a.shape)}, linear_out {tuple(b.shape)}, and "
                            f"the base a weight of {tuple(piece.shape)}: they are of different models")  # fmt: skip
        where = str(source.folder)
        dtypes = dtype_name(a.dtype, where=where), dtype_name(b.dtype, where=where)
        r = a.shape[0]
        parts.append(Part(hf.removesuffix(".weight"), r, alpha, alpha / r, dtypes))
    return parts


def _assembled(
    source: TorchDist, parts: Mapping[str, list[Part | None]], found: Found, config: ModelConfig, alpha: float,
    iteration: int, notes: tuple[str, ...],
) -> Adapter:  # fmt: skip
    tp = int(run_settings(source.folder).get("model", {}).get("tensor_model_parallel_size") or 0)
    places, ranks = {}, {}
    for module, held in parts.items():
        for kind, part in zip(_PARTS.get(module.rsplit(".", 1)[-1], (None,)), held, strict=True):
            if part:
                places[part.name] = kind, found[module]
                ranks[part.name] = part.r

    def load(part: Part, factor: str) -> Tensor:
        kind, factors = places[part.name]
        place = factors[kind, factor]
        if factor == "B" and kind in _PARTS["linear_fc1"]:
            return _halves_joined(source, place, tp)
        return read_place(source, place)

    r = next(iter(ranks.values()))
    settings = settings_of(
        ranks, dict.fromkeys(ranks, alpha), r=r, alpha=alpha, num_layers=config.num_layers, base_model=None
    )
    adapter = assemble(source.folder, parts, load, settings, config, origin=ORIGIN, iteration=iteration)
    return Adapter(adapter.folder, adapter.meta, adapter.shapes, ORIGIN, (*notes, *adapter.notes), adapter.reader)


def _halves_joined(source: TorchDist, place: Place, tp: int) -> Tensor:
    """linear_out of gate or up alone, [f, r].

    It is saved like that of a fused gate and up: every rank's rows cut in two, all first halves before all second ones.
    """
    full = read_place(source, place)
    rows = 0 if place.row is None else 1  # dimension of the rows
    pieces = len({chunk.offsets[rows] for chunk in source.entries[place.keys[0]].chunks})
    if pieces <= 2 or pieces == tp:  # of one rank, or not cut in two
        return full
    if pieces != 2 * tp:
        raise UserError(f"{source.folder}: {place.keys[0]} lies in {pieces} pieces, {RUN_CONFIG} says "
                        f"tensor_model_parallel_size {tp or 'nothing'}: their order is unknown")  # fmt: skip
    first, second = full.chunk(2)
    return torch.cat([half for pair in zip(first.chunk(tp), second.chunk(tp), strict=True) for half in pair])
