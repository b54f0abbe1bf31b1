"""A few steps at one layout, and what other layouts must reproduce: losses, gradients, changes of the adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modellink_lora.adapters.inject import fresh
from modellink_lora.config.errors import UserError
from modellink_lora.config.train import TrainConfig
from modellink_lora.data.batches import Batch
from modellink_lora.device import Device
from modellink_lora.models.build import DTYPES
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.random import normal
from modellink_lora.reporting.telemetry import Telemetry
from modellink_lora.training.assembly import Assembly, Inputs, assemble
from modellink_lora.training.data import BatchStream
from modellink_lora.training.graphs import passes_of
from modellink_lora.training.guards import Guards
from modellink_lora.training.optimizer import load_state_tensors, reduced_gradients, state_tensors, sync_parameters
from modellink_lora.training.state import Parts, gather_full
from modellink_lora.training.step import Totals, reduce_reports, run_micro_batches, train_step
from modellink_lora.verification.slope import Slope, measure_slope


@dataclass
class Trace:
    """What a run gave. Tensors are full, fp32, on the CPU of rank 0, and nowhere else."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    change: dict[str, Tensor] = field(default_factory=dict)  # of the adapter, over all steps
    plain_loss: float = 0.0  # of the first step's samples, without any dropout
    plain_gradients: dict[str, Tensor] = field(default_factory=dict)
    slopes: list[Slope] = field(default_factory=list)
    stopped: str | None = None  # the guard that stopped the run


def starting_factor(inputs: Inputs, seed: int) -> Callable[[str], Tensor]:
    """Reads the full fp32 factors that every layout starts from: the adapter's, with lora_B nowhere zero.

    B = 0 would hide errors of A and of what flows through the adapter. The noise is such that the adapter's output is
    a tenth of its input in size: an A from `fresh` gives r numbers of 1 / sqrt(3) of the input's size.
    """
    read = inputs.adapter.read if inputs.adapter else fresh(inputs.linears, seed)
    by_name = {linear.name: linear for linear in inputs.linears}

    def start(name: str) -> Tensor:
        full = read(name).float()
        module, _, factor = name.rpartition(".")
        if factor == "lora_A" or full.any():
            return full
        linear = by_name[module]
        std = 0.1 * (3 / linear.r) ** 0.5 / linear.scaling
        return normal(f"verify {name}", tuple(full.shape), seed=seed, std=std)

    return start


def run_layout(
    inputs: Inputs, train: TrainConfig, context: ParallelContext, device: Device, *, own: bool, directions: int
) -> Trace:
    """Take `train.train_iters` steps.

    Args:
        own: this is the layout that is verified: also note loss and gradients without dropout.
        directions: in how many the first step's gradient is checked by finite differences.
    """
    assembly = assemble(inputs, train, context, device)
    chunks, parts = assembly.chunks, assembly.parts
    start = starting_factor(inputs, train.seed)
    _start_from(parts, start)
    sync_parameters(train, chunks)
    trace = Trace()
    stream = inputs.data.stream("train")
    batches = stream.take(inputs.data.micro_batches)
    if own:
        for chunk in chunks:
            chunk.eval()
        trace.plain_loss, gradients = _gradients(assembly, train, batches, device)
        trace.plain_gradients = _gathered(gradients, parts)
    for chunk in chunks:
        chunk.train()
    if directions:
        # Not between the backward pass and the update of a step: with --overlap-param-gather the next forward pass
        # gathers parameters, and one in between would take that from the step.
        _, gradients = _gradients(assembly, train, batches, device)
        trace.slopes = _slopes(assembly, train, batches, device, gradients, directions)
    try:
        _steps(assembly, inputs, train, device, batches, stream, trace)
    except UserError as error:  # of a guard: all processes raise it together
        trace.stopped = str(error)
        return trace
    state = state_tensors(parts.optimizer, parts.parameters, context.dp_group)
    masters = _gathered({name: tensor for name, kind, tensor in state if kind == "master"}, parts)
    trace.change = {name: tensor - start(name) for name, tensor in masters.items()}
    return trace


def _start_from(parts: Parts, start: Callable[[str], Tensor]) -> None:
    context, layouts = parts.context, parts.layouts

    def read(name: str, kind: str) -> Tensor:
        shard = layouts[name].shard(start(name), context.tp_rank, context.tp_size)
        return shard if kind == "master" else torch.zeros_like(shard)

    load_state_tensors(parts.optimizer, parts.parameters, read, steps=0)


def _steps(
    assembly: Assembly, inputs: Inputs, train: TrainConfig, device: Device, batches: list[Batch], stream: BatchStream,
    trace: Trace,
) -> None:  # fmt: skip
    """The steps of a training run, with its guards, noting what came out of them."""
    chunks, parts, context = assembly.chunks, assembly.parts, assembly.parts.context
    base = inputs.base
    guards = Guards(
        assembly.setup.chunks, parts.layers, parts.linears, inputs.partition, context,
        layouts={spec.name: spec.layout for spec in base.family.tensors(base.config)} | parts.layouts,
        check_finite=True, overflow_is_normal=False,
    )  # fmt: skip
    telemetry = Telemetry(
        device, context, model_config=assembly.setup.chunks[0].config, dtype=DTYPES[train.dtype],
        flops=lambda lengths: 0.0, log_interval=train.train_iters + 1,
    )  # fmt: skip

    def inspect(totals: Totals) -> None:
        def forward_again() -> None:
            _loss(assembly, train, batches, device, backward=False)

        guards.before_update(len(trace.losses) + 1, totals, forward_again)
        if trace.losses:
            return
        gradients = reduced_gradients(parts.optimizer, parts.parameters, context.dp_group)
        trace.gradients = _gathered(dict(gradients), parts)

    passes = passes_of(train, device, lambda line: None)
    guards.check_replicas(0, frozen=True)
    guards.check_replicas(0)
    for number in range(train.train_iters):
        if number:
            batches[:] = stream.take(inputs.data.micro_batches)
        result = train_step(
            chunks, parts.optimizer, batches, context, device, loss_reduction=train.loss_reduction,
            telemetry=telemetry, inspect=inspect, stop=lambda: None, passes=passes,
        )  # fmt: skip
        trace.losses.append(result.totals.loss)
        trace.norms.append(result.grad_norm or 0.0)
        parts.scheduler.step(inputs.data.batch_size)
    sync_parameters(train, chunks)
    guards.check_replicas(train.train_iters)
    guards.at_end()


def _slopes(
    assembly: Assembly, train: TrainConfig, batches: Sequence[Batch], device: Device, gradients: Mapping[str, Tensor],
    directions: int,
) -> list[Slope]:  # fmt: skip
    """One direction after the other, up to the first along which the gradient is wrong."""

    def loss() -> float:
        return _loss(assembly, train, batches, device, backward=False).loss

    slopes: list[Slope] = []
    while len(slopes) < directions and not any(slope.culprit for slope in slopes):
        slopes.append(measure_slope(assembly.parts, gradients, loss, seed=len(slopes)))
    return slopes


def _gradients(
    assembly: Assembly, train: TrainConfig, batches: Sequence[Batch], device: Device
) -> tuple[float, dict[str, Tensor]]:
    """Loss of a global batch and this rank's shards of its gradients, as AdamW would see them.

    Raises:
        UserError: no sample has a trained token.
    """
    for chunk in assembly.chunks:
        chunk.zero_grad_buffer()
    totals = _loss(assembly, train, batches, device, backward=True)
    if not totals.tokens:
        raise UserError(
            "no sample of the first global batch has a trained token, so there is no gradient to verify: give another "
            "--data-path, raise --seq-length, or leave --data-path out for random tokens"
        )
    parts = assembly.parts
    return totals.loss, dict(reduced_gradients(parts.optimizer, parts.parameters, parts.context.dp_group))


def _loss(
    assembly: Assembly, train: TrainConfig, batches: Sequence[Batch], device: Device, *, backward: bool
) -> Totals:
    """Loss of a global batch, with dropout if the chunks are in training."""
    context = assembly.parts.context
    with torch.set_grad_enabled(backward):
        reports = run_micro_batches(
            assembly.chunks, batches, context, loss_reduction=train.loss_reduction, train=backward
        )
    return reduce_reports(reports, context, device, loss_reduction=train.loss_reduction)


def _gathered(local: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    return {} if parts.context.dp_rank else gather_full(local, parts.layouts, parts.context)


def short(train: TrainConfig, *, steps: int, processes: int) -> TrainConfig:
    """`train` with its kernels, dtype, loss and optimizer, but a few small steps at a constant rate, and no files."""
    return dataclasses.replace(
        train, train_iters=steps, global_batch_size=2 * train.micro_batch_size * processes, lr_decay_style="constant",
        min_lr=min(train.min_lr, train.lr), lr_decay_iters=None, lr_warmup_fraction=None, lr_warmup_iters=0,
        eval_iters=0, save=None, save_best=False, save_total_limit=0, async_save=False, tensorboard_dir=None,
        wandb_project=None, finetune=True, cuda_graph_warmup_steps=1,
        # a run finds its scale by overflowing a few times, and has no steps to spare here
        loss_scale=(train.loss_scale or 2.0**10) if train.fp16 else None,
    )  # fmt: skip


def undecorated(train: TrainConfig) -> TrainConfig:
    """`train` without what only saves memory or time: the layouts compared with should share as little as they can."""
    return dataclasses.replace(
        train, use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False,
        recompute_granularity=None, recompute_method=None, recompute_num_layers=None,
        lora_fusion=False, lora_fusion_level="auto", lora_fusion_chunks="auto", recompute_lora_inputs=True,
        use_mc2=False, use_symmetric_memory=False, transformer_impl="local", cuda_graph_impl="none",
    )  # fmt: skip
