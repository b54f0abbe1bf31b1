"""From flags to what a step needs: the inputs opened and checked, then model, optimizer and schedule on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from modellink_lora.adapters.fused import Fusion
from modellink_lora.adapters.targets import AdaptedLinear, adapted_linears
from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.partition import Partition
from modellink_lora.parallel.random import seed_everything
from modellink_lora.training.base import Base, open_base
from modellink_lora.training.chunking import Measured, chunks_of
from modellink_lora.training.data import RunData, open_data
from modellink_lora.training.graphs import check_graphs
from modellink_lora.training.optimizer import make_optimizer, make_scheduler, wrap_data_parallel
from modellink_lora.training.setup import Setup, choose_lora, partition_of, set_up
from modellink_lora.training.state import Parts


@dataclass(frozen=True)
class Inputs:
    """What the flags of a run name, opened and checked. Nothing is allocated yet."""

    base: Base
    lora: LoraConfig
    adapter: Adapter | None
    data: RunData
    partition: Partition
    linears: list[AdaptedLinear]


@dataclass(frozen=True)
class Assembly:
    """A rank's model and its chunks wrapped for data parallelism; optimizer and schedule are in `parts`."""

    setup: Setup
    chunks: list[DistributedDataParallel]
    parts: Parts


def open_inputs(
    train: TrainConfig,
    data: SftDataConfig,
    context: ParallelContext,
    *,
    model_flags: Mapping[str, Any],
    lora_flags: Mapping[str, Any],
) -> Inputs:
    """Open base, adapter and data.

    Args:
        model_flags, lora_flags: ModelConfig and LoraConfig fields the user typed.
    Raises:
        UserError: an input is missing, damaged, or does not fit the others.
    """
    if not train.load and "vocab_size" not in model_flags and data.tokenizer_name_or_path:
        model_flags = {
            **model_flags,
            "vocab_size": len(load_tokenizer(data.tokenizer_name_or_path, trust_remote_code=data.trust_remote_code)),
        }
    base = open_base(
        train.load, model_flags, tp=context.tp_size, seed=train.seed, use_mcore_models=train.use_mcore_models
    )
    if base.config.num_experts and context.tp_size > 1 and not context.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {context.tp_size} with a mixture of experts trains with --sequence-parallel "
            "only: add that flag"
        )
    lora, adapter = choose_lora(lora_flags, train.lora_load, base)
    if train.dtype == "fp32" and lora.dtype not in (None, "fp32"):
        raise UserError(
            f"--lora-dtype {lora.dtype} with an fp32 base: megatron-core's fp32 optimizer takes fp32 parameters only; "
            "leave it out, or give --bf16 or --fp16"
        )
    tokenizer = data.tokenizer_name_or_path or (str(base.tokenizer_folder) if base.tokenizer_folder else None)
    run_data = open_data(data, train, base.config, context, tokenizer=tokenizer)
    partition = partition_of(context.config, base.config.num_layers)
    return Inputs(base, lora, adapter, run_data, partition, adapted_linears(base.family, base.config, lora))


def assemble(inputs: Inputs, train: TrainConfig, context: ParallelContext, device: Device) -> Assembly:
    """Allocate and fill this rank's part. Raises UserError when model, adapter, layout and device do not fit."""
    check_graphs(train, inputs.data.config, inputs.base.config, context, device)
    seed_everything(train.seed, context, device)
    setup = set_up(
        inputs.base, inputs.lora, inputs.adapter, context, device, dtype=train.dtype, seed=train.seed,
        overrides=_overrides(train, inputs.data, context), fusion=_fusion(train, inputs.data, context, device),
        transformer_impl=train.transformer_impl,
    )  # fmt: skip
    chunks = wrap_data_parallel(train, setup.chunks, device)
    optimizer = make_optimizer(train, chunks)
    scheduler = make_scheduler(train, optimizer, inputs.data.batch_size)
    return Assembly(setup, chunks, Parts(setup.layers, inputs.linears, optimizer, scheduler, context))


def longest(train: TrainConfig, data: RunData, context: ParallelContext) -> int:
    """Tokens of this rank in the longest micro-batch, as a linear sees them that is cut over tokens."""
    tokens = train.micro_batch_size * data.padded_length
    return tokens // context.tp_size if context.sequence_parallel else tokens


def _fusion(train: TrainConfig, data: RunData, context: ParallelContext, device: Device) -> Fusion | None:
    if not train.lora_fusion:
        return None
    device.fused_collectives = train.fused_collectives(device.name)
    chunks = chunks_of(train.lora_fusion_chunks, train.deterministic)
    measured = Measured(context, device, longest(train, data, context)) if chunks == "auto" else None
    return Fusion(
        device,
        level=train.lora_fusion_level,
        chunks=measured or (lambda base: lambda rows: int(chunks)),
        # all layers are recomputed anyway, from their inputs
        recompute_inputs=train.recompute_lora_inputs and train.recompute_method != "uniform",
    )


def fusion_notes(train: TrainConfig, device: Device) -> list[str]:
    """What of the flags of the fused path and of graphs comes to nothing here."""
    notes = []
    for flag, given, home in (("--use-mc2", train.use_mc2, "npu"),
                              ("--use-symmetric-memory", train.use_symmetric_memory, "cuda")):  # fmt: skip
        if given and not (train.lora_fusion and device.name == home):
            needs = "" if train.lora_fusion else " and --lora-fusion"
            notes.append(f"{flag} has no effect here: it needs a device of kind {home}{needs}")
    if train.cuda_graph_impl == "none" and train.cuda_graph_warmup_steps != TrainConfig.cuda_graph_warmup_steps:
        notes.append("--cuda-graph-warmup-steps has no effect without --cuda-graph-impl local")
    if train.lora_fusion and train.recompute_method == "uniform":
        notes.append("inputs of adapters are not recomputed one by one: --recompute-method uniform recomputes all")
    if train.lora_fusion and train.deterministic and train.lora_fusion_chunks == "auto":
        notes.append("--lora-fusion-chunks auto is 1 with --use-deter-comp: a measured choice may differ between runs")
    return notes


def _overrides(train: TrainConfig, data: RunData, context: ParallelContext) -> dict[str, Any]:
    """Fields of megatron-core's configuration that a run decides."""
    return {
        "calculate_per_token_loss": True,  # the loss functions say by what gradients are divided
        "variable_seq_lengths": data.config.variable_seq_lengths and context.pp_size > 1 and not data.interleaved,
        "recompute_granularity": train.recompute_granularity,
        "recompute_method": train.recompute_method,
        "recompute_num_layers": train.recompute_num_layers,
        "deterministic_mode": train.deterministic,
    }
