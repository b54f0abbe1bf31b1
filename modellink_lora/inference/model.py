"""From a base and adapters on disk to a stage ready for inference, with every adapter beside every linear it adapts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.adapters.targets import adapted_linears
from modellink_lora.checkpoint.adapter import Adapter, check_flags
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.store import TRACKER
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.sources import Source, open_source
from modellink_lora.device import Device
from modellink_lora.inference.request import TUNED
from modellink_lora.inference.stage import Stage
from modellink_lora.models.build import DTYPES, build_chunks, fill, rounding_notes
from modellink_lora.models.finite import check_weight
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.training.base import Base, open_base
from modellink_lora.training.setup import check_base, check_shapes, choose_lora, partition_of


@dataclass(frozen=True)
class SourceWeights:
    """The source of a conversion, as a model's weights are read."""

    source: Source

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        layout = self.source.family.tensor(name, self.source.config).layout
        return layout.shard(self.source.read(name), rank, size)


@dataclass(frozen=True)
class HfBase(Base):
    """A base that is a Hugging Face folder."""

    @property
    def tokenizer_folder(self) -> Path | None:
        return self.root if self.root and (self.root / "tokenizer_config.json").is_file() else None


def open_any_base(config: EngineConfig, model_flags: Mapping[str, Any], *, tp: int) -> Base:
    """The base that `--load` names: Megatron or Hugging Face, or random weights of the dimensions in flags."""
    root = Path(config.load) if config.load else None
    if root and (root / "config.json").is_file() and not (root / TRACKER).is_file():
        source = open_source(ConvertConfig(load_dir=str(root), load_model_type="hf", save_model_type="mg",
                                           save_dir=str(root)))  # fmt: skip
        found = source.config.with_flags(dict(model_flags), f"--load {root}")
        found = dataclasses.replace(found, padded_vocab_size=found.padded_for(tp))
        return HfBase(found, source.family, SourceWeights(source), root)
    return open_base(
        config.load, model_flags, tp=tp, seed=config.seed, use_mcore_models=config.use_mcore_models
    )  # fmt: skip


def open_adapters(config: EngineConfig, lora_flags: Mapping[str, Any], base: Base) -> dict[str, Adapter]:
    """Name -> adapter: that of --lora-load, or in the base's own files, is `tuned`; then those of --lora-modules."""
    found: dict[str, Adapter] = {}
    if config.lora_load or base.adapter_inside:
        adapter = choose_lora(dict(lora_flags), config.lora_load, base)[1]
        assert adapter is not None
        found[TUNED] = adapter
    elif lora_flags:
        names = ", ".join(f"--lora-{name.replace('_', '-')}" for name in lora_flags)
        raise UserError(f"{names} without --lora-load: no adapter would run; give its folder, or leave the flags out")
    for name, folder in config.adapters().items():
        found[name] = open_adapter(Path(folder), flag=f"--lora-modules {name}=", base=lambda: base.config)
        check_flags(found[name], {}, flag="--lora-modules")
    return found


def load_stage(
    base: Base, adapters: Mapping[str, Adapter], context: ParallelContext, device: Device, *, dtype: str
) -> tuple[Stage, list[str]]:
    """This rank's stage and what the user should know. Raises UserError when anything does not fit together."""
    if not device.supports(DTYPES[dtype]):
        raise UserError(f"{device.describe()} has no {dtype}: choose another of --fp16, --bf16 or neither")
    partition = partition_of(context.config, base.config.num_layers)
    context.config.check_model(base.config)
    notes: list[str] = []
    fingerprint: list[str | None] = [base.fingerprint() if adapters and context.is_main else None]
    dist.broadcast_object_list(fingerprint, src=0)
    linears = {}
    for name, adapter in adapters.items():
        linears[name] = adapted_linears(base.family, base.config, adapter.meta.lora)
        notes += [*adapter.notes, *(f"warning: {warning}" for warning in adapter.warnings)]
        notes += check_base(adapter, base, fingerprint[0])
        check_shapes(adapter, linears[name])
    (model,) = build_chunks(base.config, context, partition, device, dtype=dtype)
    with torch.no_grad():
        notes += rounding_notes(fill(model, base.weights, base.family, context, partition, where=base.root), dtype)
    layers = [f"decoder.layers.{number}" for number in partition.layers(context.pp_rank, 0)]
    stage = Stage(model, layers, context, device)
    for name, adapter in adapters.items():
        wide = DTYPES[adapter.meta.lora.dtype or dtype]
        for linear in linears[name]:
            if linear.name in stage.linears:
                factors = []
                for factor, layout in (("lora_A", linear.a_layout), ("lora_B", linear.b_layout)):
                    full = adapter.read(f"{linear.name}.{factor}")
                    check_weight(full, wide, f"{adapter.folder}: {linear.name}.{factor}")
                    shard = layout.shard(full, context.tp_rank, context.tp_size)
                    factors.append(shard.to(device=context.device, dtype=wide))
                a, b = factors
                stage.linears[linear.name].adapters[name] = a.contiguous(), b.t().contiguous(), linear.scaling
    return stage, notes
