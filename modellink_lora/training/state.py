"""A run's state, free of its layout: gathered to full tensors by global name, read back on any other layout."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
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
from modellink_lora.checkpoint.adapter import META, Adapter, AdapterMeta, check_resumable, write_adapter
from modellink_lora.checkpoint.checksums import check_document, check_file, with_checksums
from modellink_lora.config.document import read_document, to_json, typed
from modellink_lora.config.errors import UserError
from modellink_lora.models.layouts import Layout, Replicated
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.training.agreement import Terms, compare
from modellink_lora.training.optimizer import (
    STATE,
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
    best: dict[str, int | float] | None = None  # iteration and validation loss
    data: dict[str, Any] = field(default_factory=dict)  # what decides the samples, see `Terms`
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Record(Progress):
    """`training.json` as it is read; files of older versions lack the newer keys."""

    scheduler: dict[str, int | float | str | bool | None] = field(default_factory=dict)
    loss_scale: dict[str, int | float] = field(default_factory=dict)
    layout: dict[str, int | bool] = field(default_factory=dict)
    crc32: dict[str, int] = field(default_factory=dict)


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
        document = with_checksums(self.training, {OPTIMIZER: folder / OPTIMIZER})
        (folder / TRAINING).write_text(to_json(document, indent=2, ensure_ascii=True) + "\n")


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
    adapter: Adapter, parts: Parts, *, load_optimizer: bool, terms: Callable[[int, int], Terms]
) -> tuple[Progress, list[str]]:
    """Restore everything but the adapter's own tensors, which are in the model already.

    Args:
        terms: what this run's flags come to where it begins at (iteration, samples consumed).
    Returns:
        The progress, and lines that tell the user what was restored and what was not.
    Raises:
        UserError: files missing or torn, or samples, order or loss that differ from the interrupted run's.
    """
    check_resumable(adapter)
    for name in (TRAINING, OPTIMIZER) if load_optimizer else (TRAINING,):
        if not (adapter.folder / name).is_file():
            raise UserError(
                f"--lora-load {adapter.folder}: {name} is missing, so the run cannot be resumed; "
                "give --finetune to start a new run from this adapter"
            )
    record, sums = _read_record(adapter, parts)
    progress = Progress(**{f.name: getattr(record, f.name) for f in dataclasses.fields(Progress)})
    now = terms(progress.iteration, progress.consumed_samples)
    agreement = compare(_terms_of(record, adapter), now, where=f"--lora-load {adapter.folder}")
    progress.data, progress.settings = dict(now.data), dict(now.settings)
    told = [f"resuming at iteration {progress.iteration}, {progress.consumed_samples} samples consumed"]
    told += agreement.lines()
    if "batch_size" in agreement.changed:
        told.append("samples go on in the same order, after those that are consumed; the schedule counts samples, and "
                    "the iterations that are left keep their places in it")  # fmt: skip
    if "validation_samples" in agreement.changed and progress.best:
        told.append(f"the best validation so far, {progress.best['loss']:.4f} at iteration "
                    f"{progress.best['iteration']}, was of other samples: it is forgotten")  # fmt: skip
        progress.best = None
    changed = _continue_schedule(parts.scheduler, record, now.settings["batch_size"])
    if changed:
        told.append(f"the schedule differs from the interrupted run's: {', '.join(changed)}")
    if record.layout != _layout(parts.context):
        same = load_optimizer and agreement.is_whole and not changed
        told.append(f"saved on another layout ({record.layout})" + ": the run continues, equal to rounding" * same)
    if load_optimizer:
        check_file(adapter.folder / OPTIMIZER, sums)
        _load_optimizer(adapter, parts, steps=progress.updates)
        load_loss_scale_state(parts.optimizer, record.loss_scale)
    else:
        progress.updates = 0  # AdamW's count begins again with its moments
        told.append("--no-load-optim: fresh optimizer moments, step count and loss scale; the schedule goes on")
    return progress, told


def _terms_of(record: _Record, adapter: Adapter) -> Terms:
    """What the interrupted run recorded, with what follows for runs of older versions, whose batch never changed."""
    data, settings = dict(record.data), dict(record.settings)
    if adapter.meta.prompt_type:
        data.setdefault("prompt_type", adapter.meta.prompt_type)
    settings.setdefault("lora_dropout", adapter.meta.lora.dropout)
    if record.iteration and not record.consumed_samples % record.iteration:
        settings.setdefault("batch_size", record.consumed_samples // record.iteration)
    return Terms(data, settings)


def _continue_schedule(scheduler: Any, record: _Record, batch_size: int) -> list[str]:
    """Put the schedule where it stood; what of it differs, in words.

    It counts samples, and this run's places are multiples of its batch. Where the batch was another one before, those
    still ahead move, so that they are met at the same iterations; those behind stay where they were.
    """
    passed = record.iteration * batch_size
    offset, saved = record.consumed_samples - passed, record.scheduler
    for key in ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps") if offset else ():
        place = getattr(scheduler, key)
        behind = min(float(saved[key] or 0), float(saved["num_steps"] or 0))
        setattr(scheduler, key, place + offset if place > passed else int(behind))
    if offset:  # the decay has a length
        scheduler.lr_decay_steps = max(scheduler.lr_decay_steps, scheduler.lr_warmup_steps + 1)
    now = scheduler.state_dict()
    changed = [f"{key} {v} -> {now[key]}" for key, v in saved.items() if key != "num_steps" and now[key] != v]
    scheduler.load_state_dict(saved)
    return changed


def _read_record(adapter: Adapter, parts: Parts) -> tuple[_Record, dict[str, int]]:
    """`training.json`, and file name -> CRC-32 of what it describes. Raises UserError when it is not as was written."""
    path = adapter.folder / TRAINING
    document = read_document(path, dict[str, Any])
    record = typed(document, _Record, where=str(path), closed=True)
    for name in ("iteration", "consumed_samples", "updates", "skipped", "not_finite", "empty_micro_batches"):
        if not 0 <= getattr(record, name) < 1 << 62:
            raise UserError(f"{path}: {name} {getattr(record, name)} is no count")
    if record.best is not None and not {"iteration", "loss"} <= record.best.keys():
        raise UserError(f"{path}: best holds {', '.join(record.best) or 'nothing'}, expected iteration and loss")
    for key, now in (("scheduler", parts.scheduler.state_dict()), ("loss_scale", loss_scale_state(parts.optimizer))):
        _check_state(getattr(record, key), now, where=f"{path}: {key}", optional=key == "loss_scale")
    if not 0 <= float(record.scheduler["num_steps"] or 0) < 1 << 62:
        raise UserError(f"{path}: scheduler.num_steps {record.scheduler['num_steps']} is no count")
    sums = check_document(document, where=path)
    if record.iteration != adapter.meta.iteration:
        raise UserError(f"{path}: is of iteration {record.iteration}, {META} beside it of {adapter.meta.iteration}: "
                        "the files are of two checkpoints")  # fmt: skip
    return record, sums


def _check_state(found: Mapping[str, Any], now: Mapping[str, Any], *, where: str, optional: bool) -> None:
    """That the state `found` has the keys and the kinds of values that this run's own state has."""
    if optional and not (found and now):
        return
    for key, value in now.items():
        if key not in found:
            raise UserError(f"{where} lacks {key}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number != (isinstance(found[key], (int, float)) and not isinstance(found[key], bool)):
            raise UserError(
                f"{where}.{key} is {json.dumps(found[key])}, expected {'a number' if is_number else 'text'}"
            )
        if is_number and not math.isfinite(found[key]):
            raise UserError(f"{where}.{key} is {found[key]}, expected a finite number")
    if strange := sorted(found.keys() - now.keys()):
        raise UserError(f"{where}: key {strange[0]!r} is not known here; known are {', '.join(now)}")


def _load_optimizer(adapter: Adapter, parts: Parts, *, steps: int) -> None:
    context, layouts = parts.context, parts.layouts
    try:
        with safe_open(adapter.folder / OPTIMIZER, framework="pt") as file:
            _check_optimizer(adapter, {name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118

            def read(name: str, kind: str) -> Tensor:
                full = file.get_tensor(f"{name}.{kind}")
                if not torch.isfinite(full).all():
                    raise UserError(f"{adapter.folder / OPTIMIZER}: {name}.{kind} holds nan or inf: take an earlier "
                                    "checkpoint")  # fmt: skip
                return layouts[name].shard(full, context.tp_rank, context.tp_size)

            load_state_tensors(parts.optimizer, parts.parameters, read, steps=steps)
    except SafetensorError as error:
        raise UserError(f"{adapter.folder / OPTIMIZER}: damaged or cut short ({error})") from None


def _check_optimizer(adapter: Adapter, found: Mapping[str, Any]) -> None:
    """That the file holds the state of every factor in its shape, in fp32, and nothing else."""
    path = adapter.folder / OPTIMIZER
    expected = {f"{name}.{kind}": tuple(shape) for name, shape in adapter.shapes.items() for kind in STATE}
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{path}: lacks {missing[0]} and {len(missing) - 1} other of {len(expected)} tensors")
    if foreign := sorted(found.keys() - expected.keys()):
        raise UserError(f"{path}: holds {foreign[0]}, which is of no factor of this adapter")
    for name, shape in expected.items():
        stored = found[name]
        if tuple(stored.get_shape()) != shape or stored.get_dtype() != "F32":
            raise UserError(f"{path}: {name} is {tuple(stored.get_shape())} of {stored.get_dtype()}, expected {shape} "
                            "of F32")  # fmt: skip
