"""From configs to a model with adapters on this rank: what training and inference share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink_lora.adapters.fused import Fusion
from modellink_lora.adapters.inject import fresh, inject
from modellink_lora.adapters.lora import LoraLinear
from modellink_lora.adapters.targets import AdaptedLinear, adapted_linears, resolve_targets
from modellink_lora.checkpoint.adapter import Adapter, check_flags
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig, parse_layer_list
from modellink_lora.device import Device
from modellink_lora.models.build import DTYPES, GPT, build_chunks, fill, rounding_notes
from modellink_lora.models.dropout import name_sites
from modellink_lora.models.te_spec import check_transformer_engine
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.partition import Partition
from modellink_lora.training.base import Base


@dataclass(frozen=True)
class Setup:
    """Filled model chunks with their adapters, and everything that was decided on the way."""

    chunks: list[GPT]  # one, or as many as the stage has runs of layers
    layers: dict[str, LoraLinear]
    linears: list[AdaptedLinear]
    base: Base
    fingerprint: str | None
    lora: LoraConfig
    adapter: Adapter | None
    partition: Partition
    notes: list[str]


def choose_lora(given: Mapping[str, Any], lora_load: str | None, base: Base) -> tuple[LoraConfig, Adapter | None]:
    """The adapter's hyper-parameters: those of `lora_load`, with which flags must agree, else what the flags say.

    Without `lora_load`, an adapter in the base's own files is taken.
    """
    given = dict(given)
    if given.get("target_modules"):
        given["target_modules"] = resolve_targets(given["target_modules"])
    inside = base.adapter_inside
    if not lora_load and inside is None:
        return LoraConfig(**{**given, "target_modules": resolve_targets(given.get("target_modules", ()))}), None
    LoraConfig(**given)  # range checks come before the comparison
    source, flag = (Path(lora_load), "--lora-load") if lora_load else (inside, "--load")
    assert source is not None
    adapter = open_adapter(source, flag=flag, base=lambda: base.config, given=given)
    if inside is not None and inside.resolve() == source.resolve():
        note = f"{inside} holds a base and an adapter: both are loaded from there"
        adapter = dataclasses.replace(adapter, notes=(note, *adapter.notes))
    elif inside is not None:
        note = f"{inside} holds an adapter beside the base: it is not used, {adapter.folder} is"
        adapter = dataclasses.replace(adapter, notes=(note, *adapter.notes))
    free = {name: given.pop(name) for name in ("dropout", "dtype") if name in given}  # of training, not of the adapter
    check_flags(adapter, given, flag=flag)
    return dataclasses.replace(adapter.meta.lora, **free), adapter


def partition_of(parallel: ParallelConfig, layers: int) -> Partition:
    """Layers over the stages of this run."""
    if parallel.num_layer_list and parallel.pipeline_model_parallel_size == 1:
        raise UserError("--num-layer-list needs --pipeline-model-parallel-size above 1")
    counts = parse_layer_list(parallel.num_layer_list) if parallel.num_layer_list else None
    return Partition.of(
        layers, parallel.pipeline_model_parallel_size, counts, parallel.num_layers_per_virtual_pipeline_stage
    )


def set_up(
    base: Base,
    lora: LoraConfig,
    adapter: Adapter | None,
    context: ParallelContext,
    device: Device,
    *,
    dtype: str,
    seed: int,
    overrides: Mapping[str, Any],
    fusion: Fusion | None = None,
    transformer_impl: str = "local",
) -> Setup:
    """Build, fill, freeze and adapt this rank's part of the model.

    Args:
        overrides: fields of megatron-core's TransformerConfig.
        fusion: of the adapters; None for the plain path.
        transformer_impl: "local" or "transformer_engine".
    Raises:
        UserError: the layout does not fit the model, the adapter belongs to another base, the device lacks the dtype,
            or the implementation cannot run this model here.
    """
    if transformer_impl == "transformer_engine":
        check_transformer_engine(base.config, device, dtype)
    if not device.supports(DTYPES[dtype]):
        raise UserError(f"{device.describe()} has no {dtype}: choose another of --fp16, --bf16 or neither")
    partition = partition_of(context.config, base.config.num_layers)
    context.config.check_model(base.config)
    notes: list[str] = []
    linears = adapted_linears(base.family, base.config, lora)
    fingerprint: list[str | None] = [base.fingerprint() if context.is_main else None]
    dist.broadcast_object_list(fingerprint, src=0)
    if adapter:
        notes += [*adapter.notes, *(f"warning: {warning}" for warning in adapter.warnings)]
        notes += check_base(adapter, base, fingerprint[0])
        check_shapes(adapter, linears)
    chunks = build_chunks(
        base.config, context, partition, device, dtype=dtype, overrides=overrides, transformer_impl=transformer_impl
    )
    layers: dict[str, LoraLinear] = {}
    rounded: dict[str, torch.dtype] = {}
    for chunk, model in enumerate(chunks):
        rounded |= fill(model, base.weights, base.family, context, partition, chunk, where=base.root)
        layers |= inject(
            model,
            linears,
            context,
            partition,
            chunk,
            dtype=DTYPES[lora.dtype or dtype],
            dropout=lora.dropout,
            read=adapter.read if adapter else fresh(linears, seed),
            fusion=fusion,
        )
        name_sites(model, seed, partition, context.pp_rank, chunk)
        if overrides.get("recompute_granularity") == "full":
            model.require_input_grad()
    notes += rounding_notes(rounded, dtype) if base.root else []
    return Setup(chunks, layers, linears, base, fingerprint[0], lora, adapter, partition, notes)


def check_base(adapter: Adapter, base: Base, fingerprint: str | None) -> list[str]:
    """Raise UserError when `adapter` was trained on another base; returns warnings."""
    expected = adapter.meta.base_fingerprint
    if expected is None or fingerprint is None:
        return [f"warning: {adapter.folder} or the base has no fingerprint: that they belong together is unchecked"]
    if expected != fingerprint:
        raise UserError(
            f"--lora-load {adapter.folder} was trained on another base than --load {base.root} "
            f"(fingerprint {expected[:8]}..., this base has {fingerprint[:8]}...): give the base it was trained on"
        )
    return []


def check_shapes(adapter: Adapter, linears: list[AdaptedLinear]) -> None:
    expected = {}
    for x in linears:
        expected[f"{x.name}.lora_A"] = (x.r, x.in_features)
        expected[f"{x.name}.lora_B"] = (x.out_features, x.r)
    found = dict(adapter.shapes)
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"--lora-load {adapter.folder}: {name} is {found.get(name, 'missing')}, "
                f"this model needs {expected.get(name, 'no such tensor')}"
            )
