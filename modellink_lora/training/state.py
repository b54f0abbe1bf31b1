"""A run's state, free of its layout: gathered to full tensors by global name, read back on any other layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modellink_lora.adapters.lora import LoraLinear
from modellink_lora.adapters.targets import AdaptedLinear
from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta, check_resumable, write_adapter
from modellink_lora.config.errors import UserError
from modellink_lora.models.layouts import Layout, Replicated
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.training.optimizer import (
    load_loss_scale_state,
    load_state_tensors,
    loss_scale_state,
    state_tensors,
)

OPTIMIZER, TRAINING = "optimizer.safetensors", "training.json"


@dataclass
class Progress:
    """How far a run has come. Dropout masks follow from the seed and the samples consumed: no random state is kept."""

    iteration: int = 0
    consumed_samples: int = 0
    updates: int = 0  # AdamW steps taken; less than `iteration` by fp16's skipped steps
    skipped: int = 0
    not_finite: int = 0
    empty_micro_batches: int = 0  # without a trained token
    best: dict[str, float] | None = None  # iteration and validation loss
    data: dict[str, Any] = field(default_factory=dict)  # what decides the order of samples


@dataclass(frozen=True)
class Parts:
    """What the state of a run is made of."""

    layers: Mapping[str, LoraLinear]
    linears: list[AdaptedLinear]
    optimizer: Any
    scheduler: Any
    context: ParallelContext

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Global name -> this rank's shard of every trained tensor."""
        return {f"{module}.{factor}": getattr(layer, factor)
                for module, layer in self.layers.items() for factor in ("lora_A", "lora_B")}  # fmt: skip

    @property
    def layouts(self) -> dict[str, Layout]:
        """Global name of a factor -> its layout, over all stages."""
        return {f"{x.name}.{factor}": layout for x in self.linears
                for factor, layout in (("lora_A", x.a_layout), ("lora_B", x.b_layout))}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, on rank 0: nothing in it changes when training goes on."""

    meta: AdapterMeta
    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    training: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        write_adapter(folder, self.tensors, self.meta)
        save_file(dict(self.optimizer), folder / OPTIMIZER)
        (folder / TRAINING).write_text(json.dumps(self.training, indent=2) + "\n")


def gather_full(
    local: Mapping[str, Tensor], layouts: Mapping[str, Layout], context: ParallelContext
) -> dict[str, Tensor]:
    """Full CPU tensors of all stages on rank 0, nothing elsewhere. Called by every process of replica 0."""
    full = {}
    for name, tensor in local.items():
        layout = layouts[name]
        shards = [tensor]
        if context.tp_size > 1 and type(layout) is not Replicated:  # the other layouts are its subclasses
            shards = [torch.empty_like(tensor) for _ in range(context.tp_size)]
            dist.all_gather(shards, tensor.contiguous(), group=context.tp_group)
        if context.tp_rank == 0:
            full[name] = layout.gather([shard.detach().to("cpu", copy=True) for shard in shards])
    if context.tp_rank:
        return {}
    if context.pp_size == 1:
        return full
    stages: list[Any] | None = [None] * context.pp_size if context.is_first_stage else None
    first = dist.get_process_group_ranks(context.pp_group)[0]
    dist.gather_object(full, stages, dst=first, group=context.pp_group)
    return {name: tensor for stage in stages or [] for name, tensor in stage.items()}


def take_snapshot(progress: Progress, meta: AdapterMeta, parts: Parts) -> Snapshot | None:
    """The state as it is now, on rank 0; None elsewhere. Every process takes part."""
    context, layouts = parts.context, parts.layouts
    held = state_tensors(parts.optimizer, parts.parameters, context.dp_group)
    state = {f"{name}.{kind}": tensor for name, kind, tensor in held}
    if context.dp_rank:
        return None  # replica 0 speaks for all
    tensors = gather_full(parts.parameters, layouts, context)
    full = gather_full(state, {name: layouts[name.rpartition(".")[0]] for name in state}, context)
    if not context.is_main:
        return None
    training = {
        **dataclasses.asdict(progress),
        "scheduler": parts.scheduler.state_dict(),
        "loss_scale": loss_scale_state(parts.optimizer),
        "layout": _layout(context),
    }
    return Snapshot(meta, tensors, full, training)


def _layout(context: ParallelContext) -> dict[str, Any]:
    return {"tensor": context.tp_size, "pipeline": context.pp_size, "data": context.dp_size,
            "sequence_parallel": context.sequence_parallel}  # fmt: skip


def resume(
    adapter: Adapter, parts: Parts, *, load_optimizer: bool, data: Mapping[str, Any]
) -> tuple[Progress, list[str]]:
    """Restore everything but the adapter's own tensors, which are in the model already.

    Returns:
        The progress, and lines that tell the user what was restored and what was not.
    Raises:
        UserError: files missing or torn, or data order that differs from the interrupted run's.
    """
    check_resumable(adapter)
    for name in (TRAINING, OPTIMIZER):
        if not (adapter.folder / name).is_file():
            raise UserError(
                f"--lora-load {adapter.folder}: {name} is missing, so the run cannot be resumed; "
                "give --finetune to start a new run from this adapter"
            )
    training = json.loads((adapter.folder / TRAINING).read_text())
    scheduler_state, scale, layout = (training.pop(key) for key in ("scheduler", "loss_scale", "layout"))
    progress = Progress(**training)
    different = [
        f"{key} {progress.data.get(key)} -> {data[key]}" for key in data if progress.data.get(key) != data[key]
    ]
    if different:
        raise UserError(
            f"--lora-load {adapter.folder}: the samples or their order would change on resume "
            f"({', '.join(different)}); restore these, or give --finetune to start a new run from this adapter"
        )
    told = [f"resuming at iteration {progress.iteration}, {progress.consumed_samples} samples consumed"]
    if layout != _layout(parts.context):
        told.append(f"saved on another layout ({layout}): the run continues, equal to rounding")
    if not load_optimizer:
        parts.scheduler.step(progress.consumed_samples)
        return progress, [*told, "--no-load-optim: fresh optimizer moments"]
    _load_optimizer(adapter, parts, steps=progress.updates)
    load_loss_scale_state(parts.optimizer, scale)
    now = parts.scheduler.state_dict()
    changed = [f"{k} {v} -> {now[k]}" for k, v in scheduler_state.items() if k != "num_steps" and now[k] != v]
    if changed:
        told.append(f"the schedule differs from the interrupted run's: {', '.join(changed)}")
    parts.scheduler.load_state_dict(scheduler_state)
    return progress, told


def _load_optimizer(adapter: Adapter, parts: Parts, *, steps: int) -> None:
    context, layouts = parts.context, parts.layouts
    try:
        with safe_open(adapter.folder / OPTIMIZER, framework="pt") as file:

            def read(name: str, kind: str) -> Tensor:
                return layouts[name].shard(file.get_tensor(f"{name}.{kind}"), context.tp_rank, context.tp_size)

            load_state_tensors(parts.optimizer, parts.parameters, read, steps=steps)
    except SafetensorError as error:
        raise UserError(f"{adapter.folder / OPTIMIZER}: damaged or cut short ({error})") from None
