"""The passes of a step over its micro-batches, recorded once as a graph of kernels and replayed in later steps.

A replay launches the recorded kernels on the recorded addresses; none of our Python runs. So whatever differs from one
step to the next has to be a number in memory at a fixed place: weights and gradients are, and each batch, with the
sample numbers that dropout masks are hashed from, is copied to where the recorded one stood. That nothing else differs
is not taken on trust: the first replays are compared with ordinary passes over the same batches, and a difference ends
the run. What follows the passes (sums over replicas, the update) is not recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.data.batches import Batch
from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.random import without_streams
from modellink_lora.training.step import Passes, run_micro_batches

_FLAG = "--cuda-graph-impl local"
COMPARED = 2  # replays: of the batches that were recorded, and of others behind an update of the weights
# Greatest relative distance of losses and gradients. Kernels that add in no fixed order move them by roundings; a mask,
# a batch or a weight of another step moves gradients by far more.
_NEAR = {"fp32": 1e-4, "bf16": 2e-2}


def check_graphs(
    train: TrainConfig, data: SftDataConfig, model: ModelConfig, context: ParallelContext, device: Device
) -> None:
    """Raise UserError when the passes of this run cannot be recorded."""
    if train.cuda_graph_impl == "none":
        return
    if not device.records_graphs:
        device.record(lambda: None)  # says what is missing
    if context.pp_size > 1:
        raise UserError(
            f"{_FLAG} is not offered with pipeline stages: leave it out, or give tensor parallelism instead"
        )
    if data.variable_seq_lengths:
        raise UserError(f"{_FLAG} replays steps of one shape: leave out --variable-seq-lengths, or this flag")
    if model.num_experts:
        raise UserError(f"{_FLAG}: a mixture of experts multiplies other shapes in every step; leave it out")


def passes_of(train: TrainConfig, device: Device, say: Callable[[str], None]) -> Passes:
    """The function that computes gradients of a step's micro-batches; `say` takes a line for the user."""
    return run_micro_batches if train.cuda_graph_impl == "none" else Replayed(train, device, say)


class Replayed:
    """Stands in for `run_micro_batches` in training, for batches of one shape.

    Args:
        say: takes a line for the user.
    """

    def __init__(self, train: TrainConfig, device: Device, say: Callable[[str], None]) -> None:
        self._device, self._say = device, say
        self._warm_up, self._near = train.cuda_graph_warmup_steps, 0.0 if train.deterministic else _NEAR[train.dtype]
        self._steps, self._compared = 0, 0
        self._recording: _Recording | None = None

    def __call__(
        self,
        chunks: Sequence[Any],
        batches: Sequence[Batch],
        context: ParallelContext,
        *,
        loss_reduction: str,
        train: bool,
    ) -> list[dict[str, Tensor]]:
        """As `run_micro_batches`; the reports are overwritten by the next step."""
        assert train
        (chunk,) = chunks
        ordinary = functools.partial(
            run_micro_batches, chunks, batches, context, loss_reduction=loss_reduction, train=True
        )
        self._steps += 1
        # kernels are compiled and libraries set up in the first steps; a measured step is to show its parts
        if self._steps <= self._warm_up or chunk.config.timers is not None:
            return ordinary()
        if self._recording is None:
            self._recording = _Recording(self._device, chunk, batches, context, loss_reduction)
        replayed = self._recording.replay(batches)
        if self._compared == COMPARED:
            return replayed
        numbers = _numbers(chunk, replayed)
        chunk.zero_grad_buffer()
        reports = ordinary()
        self._compare(numbers, _numbers(chunk, reports))
        return reports

    def _compare(self, replayed: dict[str, Tensor], ordinary: dict[str, Tensor]) -> None:
        """All processes come to the same end."""
        distances = torch.stack([_distance(replayed[name], ordinary[name]) for name in ordinary])
        dist.all_reduce(distances, op=dist.ReduceOp.MAX)
        for name, distance in zip(ordinary, distances.tolist(), strict=True):
            if distance > self._near:
                raise UserError(
                    f"{_FLAG}: a replayed step gives other {name} than an ordinary one, relative distance "
                    f"{distance:.1e} where {self._near:.0e} is allowed; nothing was updated with it. Leave the flag out"
                )
        self._compared += 1
        if self._compared == COMPARED:
            self._say(
                f"steps are replayed from a CUDA graph from now on; the first {COMPARED} replays gave the losses and "
                f"gradients of ordinary steps (relative distance at most {self._near:.0e})"
            )


class _Recording:
    """The recorded passes, and the places that they read their batches from."""

    def __init__(
        self, device: Device, chunk: Any, batches: Sequence[Batch], context: ParallelContext, loss_reduction: str
    ) -> None:
        self._chunk = chunk
        self._batches = [{name: tensor.to(context.device, copy=True) for name, tensor in b.items()} for b in batches]
        self._finish = chunk.config.finalize_model_grads_func
        self._counted: tuple[Tensor, dict[str, Any]] | None = None
        chunk.config.finalize_model_grads_func = self._note
        try:
            with without_streams():
                self._replay, self._reports = device.record(
                    lambda: run_micro_batches(
                        [chunk], self._batches, context, loss_reduction=loss_reduction, train=True
                    )
                )
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{_FLAG}: the passes of a step could not be recorded ({reason}); leave the flag out"
            ) from error
        finally:
            chunk.config.finalize_model_grads_func = self._finish

    def _note(self, chunks: Sequence[Any], count: Tensor, **settings: Any) -> None:
        self._counted = count, settings

    def replay(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Gradients of `batches`, added to those in the chunk and finished as after ordinary passes; their reports."""
        for place, batch in zip(self._batches, batches, strict=True):
            for name, tensor in batch.items():
                assert place[name].shape == tensor.shape, (name, place[name].shape, tensor.shape)
                place[name].copy_(tensor)
        self._replay()
        assert self._counted is not None
        count, settings = self._counted
        self._finish([self._chunk], count.clone(), **settings)  # summed over replicas in place
        return self._reports


def _numbers(chunk: Any, reports: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a pass leaves behind, copied."""
    return {
        "losses": torch.stack([torch.stack([report[key].float() for key in sorted(report)]) for report in reports]),
        "gradients": torch.cat([buffer.grad_data.flatten() for buffer in chunk.buffers]),
    }


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| / |other|, Euclidean, over the finite numbers; infinite where only one of two is finite."""
    if not torch.equal(one.isfinite(), other.isfinite()):
        return other.new_tensor(torch.inf)
    one, other = one.where(one.isfinite(), 0), other.where(other.isfinite(), 0)
    return (one - other).norm() / other.norm().clamp(min=torch.finfo(other.dtype).tiny)
