"""Adapter checkpoints of a run: gathered to full tensors by global name, written once, read back on any layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modellink_lora.adapters.lora import LoraLinear
from modellink_lora.adapters.targets import AdaptedLinear
from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta, write_adapter
from modellink_lora.checkpoint.store import iteration_folder, replacing_folder, write_tracker
from modellink_lora.config.errors import UserError
from modellink_lora.device import Device
from modellink_lora.models.layouts import Layout, Replicated
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.random import rng_states, set_rng_states
from modellink_lora.training.optimizer import (
    load_loss_scale_state,
    load_state_tensors,
    loss_scale_state,
    state_tensors,
)

OPTIMIZER, RNG, TRAINING = "optimizer.safetensors", "rng.safetensors", "training.json"


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0
    updates: int = 0  # AdamW steps taken; less than `iteration` by fp16's skipped steps
    skipped: int = 0
    not_finite: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # what decides the order of samples


def local_parameters(layers: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """Global name -> this rank's shard of every trained tensor."""
    return {f"{module}.{factor}": getattr(layer, factor)
            for module, layer in layers.items() for factor in ("lora_A", "lora_B")}  # fmt: skip


def layouts_of(linears: list[AdaptedLinear]) -> dict[str, Layout]:
    """Global name of a factor -> its layout."""
    pairs = [(f"{x.name}.lora_A", x.a_layout) for x in linears] + [(f"{x.name}.lora_B", x.b_layout) for x in linears]
    return dict(pairs)


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
            full[name] = layout.gather([shard.detach().cpu() for shard in shards])
    if context.tp_rank:
        return {}
    if context.pp_size == 1:
        return full
    stages: list[Any] | None = [None] * context.pp_size if context.is_first_stage else None
    first = dist.get_process_group_ranks(context.pp_group)[0]
    dist.gather_object(full, stages, dst=first, group=context.pp_group)
    return {name: tensor for stage in stages or [] for name, tensor in stage.items()}


def save(
    root: Path,
    progress: Progress,
    *,
    meta: AdapterMeta,
    layers: Mapping[str, LoraLinear],
    linears: list[AdaptedLinear],
    optimizer: Any,
    scheduler: Any,
    context: ParallelContext,
    device: Device,
) -> None:
    """Write `iter_N` below `root`, then the tracker. Every process takes part; rank 0 writes."""
    parameters, layouts = local_parameters(layers), layouts_of(linears)
    tensors: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    if context.dp_rank == 0:
        tensors = gather_full(parameters, layouts, context)
        local = {f"{name}.{kind}": tensor for name, kind, tensor in state_tensors(optimizer, parameters)}
        state = gather_full(local, {name: layouts[name.rpartition(".")[0]] for name in local}, context)
    random: list[Any] | None = [None] * context.world_size if context.is_main else None
    dist.gather_object(rng_states(device), random, dst=0)
    if context.is_main:
        training = {
            **vars(progress),
            "scheduler": scheduler.state_dict(),
            "loss_scale": loss_scale_state(optimizer),
            "layout": _layout(context),
        }
        with replacing_folder(iteration_folder(root, progress.iteration)) as folder:
            write_adapter(folder, tensors, meta)
            save_file(state, folder / OPTIMIZER)
            save_file(
                {
                    f"rank{rank}.{name}": value
                    for rank, states in enumerate(random or [])
                    for name, value in states.items()
                },
                folder / RNG,
            )
            (folder / TRAINING).write_text(json.dumps(training, indent=2) + "\n")
        write_tracker(root, progress.iteration)
    dist.barrier()


def _layout(context: ParallelContext) -> dict[str, Any]:
    return {"tensor": context.tp_size, "pipeline": context.pp_size, "data": context.dp_size,
            "sequence_parallel": context.sequence_parallel}  # fmt: skip


def resume(
    adapter: Adapter,
    *,
    layers: Mapping[str, LoraLinear],
    linears: list[AdaptedLinear],
    optimizer: Any,
    scheduler: Any,
    context: ParallelContext,
    device: Device,
    load_optimizer: bool,
    load_rng: bool,
    data: Mapping[str, Any],
) -> tuple[Progress, list[str]]:
    """Restore everything but the adapter's own tensors, which are in the model already.

    Returns:
        The progress, and lines that tell the user what was restored and what was not.
    Raises:
        UserError: files missing, or data order that differs from the interrupted run's.
    """
    for name in (TRAINING, OPTIMIZER, RNG):
        if not (adapter.folder / name).is_file():
            raise UserError(
                f"--lora-load {adapter.folder}: {name} is missing, so the run cannot be resumed; "
                "give --finetune to start a new run from this adapter"
            )
    training = json.loads((adapter.folder / TRAINING).read_text())
    scheduler_state, scale, layout = (training.pop(key) for key in ("scheduler", "loss_scale", "layout"))
    progress = Progress(**training)
    different = [f"{key} {progress.data[key]} -> {data[key]}" for key in data if progress.data.get(key) != data[key]]
    if different:
        raise UserError(
            f"--lora-load {adapter.folder}: the order of samples would change on resume ({', '.join(different)}); "
            "restore these, or give --finetune to start a new run from this adapter"
        )
    told = [f"resuming at iteration {progress.iteration}, {progress.consumed_samples} samples consumed"]
    if load_optimizer:
        layouts, parameters = layouts_of(linears), local_parameters(layers)
        with safe_open(adapter.folder / OPTIMIZER, framework="pt") as file:

            def read(name: str, kind: str) -> Tensor:
                return layouts[name].shard(file.get_tensor(f"{name}.{kind}"), context.tp_rank, context.tp_size)

            load_state_tensors(optimizer, parameters, read, steps=progress.updates)
        load_loss_scale_state(optimizer, scale)
        now = scheduler.state_dict()
        changed = [f"{k} {v} -> {now[k]}" for k, v in scheduler_state.items() if k != "num_steps" and now[k] != v]
        if changed:
            told.append(f"the schedule differs from the interrupted run's: {', '.join(changed)}")
        scheduler.load_state_dict(scheduler_state)
    else:
        scheduler.step(progress.consumed_samples)
        told.append("--no-load-optim: fresh optimizer moments")
    if load_rng and layout == _layout(context):
        prefix = f"rank{context.rank}."
        states = load_file(adapter.folder / RNG)
        set_rng_states({k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}, device)
    elif load_rng:
        told.append(f"saved on another layout ({layout}): random states start anew")
    return progress, told
