"""The tables a run begins with: model, layout, adapter, schedule, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from modellink_lora.adapters.fused import FUSION_HEADER, FUSION_TITLE, fusion_rows
from modellink_lora.adapters.lora import LoraLinear
from modellink_lora.adapters.targets import AdaptedLinear, trainable_table
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.train import TrainConfig
from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.partition import Partition
from modellink_lora.planning.memory import Plan, rank_memory
from modellink_lora.reporting.report import print_table
from modellink_lora.training.base import Base
from modellink_lora.training.data import RunData

ADAPTER_HEADER = ("module", "layers", "lora_A", "lora_B", "over tensor ranks", "parameters")


def memory_of(
    train: TrainConfig, base: Base, lora: LoraConfig, linears: Sequence[AdaptedLinear], partition: Partition,
    run_data: RunData, context: ParallelContext,
) -> list[dict[str, int]]:  # fmt: skip
    """Estimated bytes of a rank of each stage by what they hold, and their "total". Nothing need be allocated yet."""
    plan = plan_of(
        train, base.config, lora, partition, tp=context.tp_size, dp=context.dp_size,
        sequence_parallel=context.sequence_parallel, length=run_data.padded_length,
        micro_batches=run_data.micro_batches, device_type=context.device.type,
    )  # fmt: skip
    return [rank_memory(plan, linears, stage=stage) for stage in range(context.pp_size)]


def plan_of(
    train: TrainConfig, model: ModelConfig, lora: LoraConfig, partition: Partition, *, tp: int, dp: int,
    sequence_parallel: bool, length: int, micro_batches: int, device_type: str,
) -> Plan:  # fmt: skip
    """What decides a run's memory.

    Args:
        length: padded, of the longest samples.
        micro_batches: of one step on one replica.
    """
    return Plan(
        model=model, partition=partition, tp=tp, dp=dp, sequence_parallel=sequence_parallel,
        micro_batch_size=train.micro_batch_size, length=length, micro_batches=micro_batches, dtype=train.dtype,
        adapter_dtype=lora.dtype or train.dtype, lora_dropout=lora.dropout,
        recompute_granularity=train.recompute_granularity, recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers, distributed_optimizer=train.use_distributed_optimizer,
        lora_fusion=train.lora_fusion, lora_fusion_level=train.lora_fusion_level,
        lora_fusion_chunks=None if train.lora_fusion_chunks == "auto" else int(train.lora_fusion_chunks),
        recompute_lora_inputs=train.recompute_lora_inputs, cpu=device_type == "cpu",
        fused_collectives=train.fused_collectives(device_type),
    )  # fmt: skip


def summary_rows(
    train: TrainConfig, base: Base, lora: LoraConfig, origin: str, linears: Sequence[AdaptedLinear],
    partition: Partition, run_data: RunData, context: ParallelContext, device: Device,
    memory: Sequence[Mapping[str, int]],
) -> list[tuple[str, str]]:  # fmt: skip
    """(what, text) of the run.

    Args:
        origin: where the adapter comes from, in words.
        memory: of each stage, see `memory_of`.
    """
    config = base.config
    sp = " with sequence parallel" if context.sequence_parallel else ""
    schedule = f"{train.lr_decay_style}, lr {train.lr:g} -> {train.min_lr:g}"
    most = max(memory, key=lambda parts: parts["total"])
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in most.items() if name != "total")
    stages = f" (stage {memory.index(most)}, the largest)" if len(memory) > 1 else ""
    beyond = ", ".join(config.beyond_llama())
    by_te = train.transformer_impl == "transformer_engine"
    caution = f"; {beyond} is not in this estimate, which knows Llama's layers" if beyond else ""
    caution += "; the CUDA graph keeps the activations a second time" * (train.cuda_graph_impl != "none")
    return [
        ("model", f"{config.hf_model_type}, {config.num_layers} layers, hidden {config.hidden_size}, "
                  f"{config.parameter_count():,} parameters, from {base.root or 'random weights'}"),
        ("device", device.describe()),
        *([("layers", "linears and norms by Transformer Engine, attention by the device's kernels")] if by_te else ()),
        ("layout", f"{context.world_size} processes = TP {context.tp_size}{sp} x PP {context.pp_size} "
                   f"(layers {partition.describe()}) x DP {context.dp_size}"),
        ("dtype", f"weights {train.dtype}, adapters {lora.dtype or train.dtype}, gradients and masters fp32"),
        ("adapter", f"r {lora.r}, alpha {lora.alpha:g}, scaling {linears[0].scaling:g}, dropout {lora.dropout:g}, "
                    + origin),
        ("data", f"{run_data.config.data_path[0]}: train {len(run_data.splits['train']):,}, "
                 f"validation {len(run_data.splits['valid']):,}, test {len(run_data.splits['test']):,} samples"),
        ("schedule", f"{train.train_iters} iterations x {run_data.batch_size} samples, {schedule}"),
        ("memory a rank", f"{most['total'] / 2**20:,.0f} MB of tensors at the longest samples{stages}: {parts}"
                          + caution),
    ]  # fmt: skip


def print_summary(
    rows: Sequence[tuple[str, str]],
    linears: Sequence[AdaptedLinear],
    base: Base,
    notes: Sequence[str],
    fusion: Sequence[Sequence[str]] = (),
) -> None:
    """The table of the run, the table of adapters, ModelLink's line of trainable parameters, notes.

    Args:
        fusion: rows of `fusion_of_all`.
    """
    print_table("run", rows)
    print_table(
        "trainable parameters (all tensor and pipeline ranks together)",
        trainable_table(linears, base.config),
        ADAPTER_HEADER,
    )
    if fusion:
        print_table(FUSION_TITLE, fusion, FUSION_HEADER)
    trainable = sum(linear.parameters for linear in linears)
    total = trainable + base.config.parameter_count()
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    for note in notes:
        print(note if note.startswith("warning") else f"note: {note}", flush=True)


def fusion_of_all(
    layers: Mapping[str, LoraLinear], rows: int, context: ParallelContext
) -> tuple[list[tuple[str, ...]], list[str]]:  # fmt: skip
    """Rows under FUSION_HEADER over all stages, alike ones counted, and the lines. All processes call it together."""
    speaks = context.tp_rank == 0 and context.dp_rank == 0  # one process for each stage
    everyone: list[Any] = [None] * context.world_size
    dist.all_gather_object(everyone, fusion_rows(layers, rows) if speaks else ([], []))
    counts = Counter(row for fused, _ in everyone for row in fused)
    table = [(module, str(count), *rest) for (module, *rest), count in counts.items()]
    return table, [line for _, fallen in everyone for line in fallen]
