"""One optimizer step and one validation: micro-batches through megatron-core's schedules, and the masked loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.data.batches import Batch
from modellink_lora.device import Device
from modellink_lora.megatron.differences import schedule
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.random import set_samples
from modellink_lora.reporting.telemetry import Telemetry

# What a loss function gives to megatron-core: a value to differentiate, the number that gradients are divided by once
# all of the global batch is summed, and a report for us.
Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
Passes = Callable[..., list[dict[str, Tensor]]]  # `run_micro_batches`, or what does the same in another way


@dataclass(frozen=True)
class Totals:
    """What one global batch gave, the same on every process."""

    loss: float  # as optimised: mean of micro-batch means, or token-weighted; nan where no token is trained
    tokens: int  # trained tokens
    micro_batches: int  # with a trained token
    alarm: bool = False  # a gradient is not finite somewhere
    stop: bool = False  # some process was asked to stop


@dataclass(frozen=True)
class StepResult:
    totals: Totals
    grad_norm: float | None
    skipped: bool  # fp16 overflow, or no trained token in the global batch


def micro_batch_loss(loss_mask: Tensor, losses: Tensor) -> Loss:
    """Mean over trained tokens of a micro-batch, counted once; one without trained tokens is not counted.

    losses [b, s]. Gradients are divided by the number of micro-batches that count.
    """
    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    mean = total / tokens.clamp(min=1)
    return mean, (tokens > 0).to(torch.int), _report(total, tokens, mean)


def token_loss(loss_mask: Tensor, losses: Tensor) -> Loss:
    """Sum over trained tokens; gradients are divided by the trained tokens of the whole global batch."""
    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    return total.clone(), tokens.to(torch.int), _report(total, tokens, total / tokens.clamp(min=1))


def _report(total: Tensor, tokens: Tensor, mean: Tensor) -> dict[str, Tensor]:
    # copies: megatron-core scales the returned loss in place
    return {"total": total.detach(), "tokens": tokens, "mean": mean.detach().clone(), "counts": (tokens > 0).float()}


LOSSES: dict[str, Callable[[Tensor, Tensor], Loss]] = {"micro-batch": micro_batch_loss, "token": token_loss}


def run_micro_batches(
    chunks: Sequence[Any],
    batches: Sequence[Batch],
    context: ParallelContext,
    *,
    loss_reduction: str,
    train: bool,
) -> list[dict[str, Tensor]]:
    """Forward, and backward if `train`, over the micro-batches of this replica; gradients are left in the chunks.

    Returns the reports of the loss function, on the last stage.
    """
    reduce = LOSSES[loss_reduction]

    def forward_step(data: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = {name: tensor.to(context.device) for name, tensor in next(data).items()}
        set_samples(batch["samples"])
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, functools.partial(reduce, batch["loss_mask"])

    micro_batch_size, length = batches[0]["tokens"].shape
    interleaved = len(chunks) > 1
    run = schedule(context.pp_size, len(chunks))
    return list(
        run(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=length,  # with --variable-seq-lengths stages tell each other the length of each micro-batch
            micro_batch_size=micro_batch_size,
            forward_only=not train,
        )
    )


def reduce_reports(
    reports: Sequence[dict[str, Tensor]],
    context: ParallelContext,
    device: Device,
    *,
    loss_reduction: str,
    alarm: bool = False,
    stop: bool = False,
) -> Totals:
    """Sum the reports of all replicas: one small collective, which also tells everybody of anybody's alarm or stop."""
    sums = torch.zeros(6, dtype=device.widest_float, device=context.device)
    if context.is_last_stage and context.tp_rank == 0:  # one process speaks for each replica
        for report in reports:
            sums[:4] += torch.stack([report[key] for key in ("mean", "total", "tokens", "counts")]).to(sums)
    sums[4:] += torch.tensor([alarm, stop]).to(sums)
    dist.all_reduce(sums)
    mean, total, tokens, counted, alarms, stops = sums.tolist()
    loss = math.nan  # a mean of nothing; 0 would be the best loss there is
    if counted:
        loss = total / tokens if loss_reduction == "token" else mean / counted
    return Totals(loss, int(tokens), int(counted), alarms > 0, stops > 0)


def gradients_finite(chunks: Sequence[Any]) -> bool:
    """Whether this process's gradients are numbers: the largest magnitude is NaN or infinite if one is not."""
    buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    return all(bool(torch.linalg.vector_norm(b, ord=float("inf")).isfinite()) for b in buffers if b.numel())


def train_step(
    chunks: Sequence[Any],
    optimizer: Any,
    batches: Sequence[Batch],
    context: ParallelContext,
    device: Device,
    *,
    loss_reduction: str,
    telemetry: Telemetry,
    inspect: Callable[[Totals], None],
    stop: Callable[[], str | None],
    passes: Passes = run_micro_batches,
) -> StepResult:
    """Gradients of one global batch and one AdamW update.

    Args:
        inspect: called between the two, with gradients in place and weights still as they were; it may raise.
        stop: whether this process was asked to stop; all learn of it in the totals.
        passes: computes the gradients.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = passes(chunks, batches, context, loss_reduction=loss_reduction, train=True)
    alarm = not gradients_finite(chunks)
    totals = reduce_reports(reports, context, device, loss_reduction=loss_reduction, alarm=alarm, stop=bool(stop()))
    inspect(totals)
    if not totals.tokens:  # AdamW would still move the weights, by its moments and the weight decay
        return StepResult(totals, None, skipped=True)
    with telemetry.part("optimizer"):
        updated, grad_norm, _ = optimizer.step()
    return StepResult(totals, None if grad_norm is None else float(grad_norm), not updated)


def validation_loss(
    chunks: Sequence[Any],
    batches: Sequence[Batch],
    context: ParallelContext,
    device: Device,
    *,
    loss_reduction: str,
) -> Totals:
    """Loss of the given micro-batches without dropout, and the tokens that it is a mean over."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        reports = run_micro_batches(chunks, batches, context, loss_reduction=loss_reduction, train=False)
    for chunk in chunks:
        chunk.train()
    return reduce_reports(reports, context, device, loss_reduction=loss_reduction)
