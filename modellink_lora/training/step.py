"""One optimizer step and one validation: micro-batches through megatron-core's schedule, and the masked loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from modellink_lora.parallel.context import ParallelContext

Batch = dict[str, Tensor]  # tokens, labels, loss_mask, position_ids: [b, s]


@dataclass(frozen=True)
class StepResult:
    """What one global batch gave, the same on every process."""

    loss: float  # as optimised: mean of micro-batch means, or token-weighted
    tokens: int  # trained tokens
    grad_norm: float | None = None
    skipped: bool = False  # fp16 overflow


def micro_batch_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over trained tokens of a micro-batch; one without trained tokens counts as 0. losses [b, s]"""
    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    mean = total / tokens.clamp(min=1)
    # megatron-core divides the returned tensor in place by the number of micro-batches: report a copy
    return mean, {"total": total.detach(), "tokens": tokens, "mean": mean.detach().clone()}


def token_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over trained tokens; megatron-core divides gradients by the tokens of the whole global batch."""
    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    report = {"total": total.detach(), "tokens": tokens, "mean": total.detach() / tokens.clamp(min=1)}
    return total.clone(), tokens.to(torch.int), report


def run_micro_batches(
    model: Any, batches: Iterator[Batch], context: ParallelContext, *, count: int, shape: tuple[int, int], train: bool
) -> StepResult:
    """Forward, and backward if `train`, over `count` micro-batches; gradients are left in the model.

    Args:
        shape: (micro batch size, sequence length) of fixed-length micro-batches.
    """
    per_token = model.config.calculate_per_token_loss
    reduce = token_loss if per_token else micro_batch_loss

    def forward_step(data: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = {name: tensor.to(context.device) for name, tensor in next(data).items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, functools.partial(reduce, batch["loss_mask"])

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=count,
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=not train,
    )
    sums = torch.zeros(4, dtype=torch.float64 if context.device.type == "cpu" else torch.float32, device=context.device)
    if context.is_last_stage:
        for report in reports:
            sums += torch.stack(
                [report["mean"], report["total"], report["tokens"], torch.ones_like(report["mean"])]
            ).to(sums)
        dist.all_reduce(sums, group=context.dp_group)
    if context.pp_size > 1:
        last = dist.get_process_group_ranks(context.pp_group)[-1]
        dist.broadcast(sums, src=last, group=context.pp_group)
    mean, total, tokens, micro_batches = sums.tolist()
    return StepResult(loss=total / max(tokens, 1) if per_token else mean / micro_batches, tokens=int(tokens))


def train_step(
    model: Any,
    optimizer: Any,
    batches: Iterator[Batch],
    context: ParallelContext,
    *,
    count: int,
    shape: tuple[int, int],
) -> StepResult:
    """Gradients of one global batch and one AdamW update."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    result = run_micro_batches(model, batches, context, count=count, shape=shape, train=True)
    updated, grad_norm, _ = optimizer.step()
    return StepResult(result.loss, result.tokens, None if grad_norm is None else float(grad_norm), not updated)
