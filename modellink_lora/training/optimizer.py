"""megatron-core's AdamW over fp32 masters, and its state as plain tensors by parameter name.

The state of one parameter is its fp32 master and two fp32 moments, each of the parameter's own shape, so a checkpoint
can gather and cut them exactly as it does the parameter (docs/adr/0003).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from modellink_lora.config.train import TrainConfig
from modellink_lora.device import Device
from modellink_lora.models.build import DTYPES, GPT

STATE = ("master", "exp_avg", "exp_avg_sq")


def wrap_data_parallel(
    config: TrainConfig, chunks: Sequence[GPT], device: Device
) -> list[DistributedDataParallel]:  # fmt: skip
    """Gradients of adapters in fp32 buffers, summed over replicas once per step, or bucket by bucket in backward."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
    )
    with device.recordable() if config.cuda_graph_impl != "none" else contextlib.nullcontext():
        wrapped = [
            # only the first chunk's gradients come last in backward, so only there do small buckets hide anything
            DistributedDataParallel(chunk.config, dataclasses.replace(settings), chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    if config.overlap_grad_reduce:  # reduce in the last micro-batch only
        pauses = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return wrapped


def sync_parameters(config: TrainConfig, chunks: Sequence[DistributedDataParallel]) -> None:
    """Complete the weights after a step whose parameter gathering waits for the next forward pass."""
    if config.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def make_optimizer(config: TrainConfig, chunks: Sequence[DistributedDataParallel]) -> Any:
    """AdamW over the trainable parameters of `chunks`, wired into megatron-core's schedules."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=DTYPES[config.dtype],
        loss_scale=config.loss_scale,
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=config.min_loss_scale,
        loss_scale_window=config.loss_scale_window,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, list(chunks))
    chunks[0].config.finalize_model_grads_func = finalize_gradients
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def finalize_gradients(chunks: Sequence[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
    """megatron-core's reduction over replicas, then the sum over tensor ranks of what each has a share of.

    Those are the gradients of the factors that all tensor ranks hold, in one flat collective for each global batch.
    Under the distributed optimizer only a replica's slice of the sum is right, which is the slice that it updates.
    """
    finalize_model_grads(chunks, *args, **kwargs)
    shares = [
        parameter.main_grad
        for chunk in chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, "partial_over_tensor_ranks", False)
    ]
    group = parallel_state.get_tensor_model_parallel_group()
    if shares and group.size() > 1:
        flat = torch.cat([share.flatten() for share in shares])
        dist.all_reduce(flat, group=group)
        for share, summed in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
            share.copy_(summed.view_as(share))


def make_scheduler(config: TrainConfig, optimizer: Any, batch_size: int) -> OptimizerParamScheduler:
    """Megatron's schedule, which counts samples."""
    decay = (config.lr_decay_iters or config.train_iters) * batch_size
    warmup = config.lr_warmup_iters * batch_size
    if config.lr_warmup_fraction is not None:
        warmup = int(config.lr_warmup_fraction * decay)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # on resume the flags of this run hold, and changes are told
        override_opt_param_scheduler=True,
    )


def learning_rate(optimizer: Any) -> float:
    return float(optimizer.param_groups[0]["lr"])


@dataclass(frozen=True)
class _Held:
    """The fp32 tensor that AdamW updates for a parameter, and which of the parameter's elements it is."""

    main: Tensor
    span: slice  # of the flattened parameter

    def cut(self, full: Tensor) -> Tensor:
        return full.reshape(-1)[self.span].view(self.main.shape)


def _held(optimizer: Any, parameter: Tensor) -> _Held | None:
    """A replica's own part of `parameter`: all of it, or a slice under the distributed optimizer, or nothing."""
    megatron = _megatron(optimizer)
    if not isinstance(megatron, DistributedOptimizer):
        master = getattr(parameter, "main_param", None)  # of a low-precision parameter; else AdamW updates itself
        return _Held(parameter if master is None else master, slice(0, parameter.numel()))
    place = megatron.model_param_group_index_map.get(parameter)
    if place is None:
        return None
    span = megatron._get_model_param_range_map(parameter)["param"]
    group, index = place
    return _Held(megatron.optimizer.param_groups[group]["params"][index], slice(span.start, span.end))


def state_tensors(
    optimizer: Any, parameters: Mapping[str, Tensor], dp_group: dist.ProcessGroup | None = None
) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter name, one of STATE, tensor of the parameter's shape) for every parameter; moments start at zero.

    Under the distributed optimizer the replicas of `dp_group` hold slices, and must iterate together.
    """
    sliced = isinstance(_megatron(optimizer), DistributedOptimizer)
    for name, parameter in parameters.items():
        held = _held(optimizer, parameter)
        for kind in STATE:
            full = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            if held is not None:
                state = _inner(optimizer).state.get(held.main, {})
                value = held.main.detach() if kind == "master" else state.get(kind)
                if value is not None:
                    held.cut(full).copy_(value)
            if sliced:  # slices do not overlap: adding zeros changes no bit
                dist.all_reduce(full, group=dp_group)
            yield name, kind, full


def reduced_gradients(
    optimizer: Any, parameters: Mapping[str, Tensor], dp_group: dist.ProcessGroup | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, gradient of the parameter's shape) as AdamW will see it: summed over replicas, not clipped.

    Under the distributed optimizer the replicas of `dp_group` hold slices, and must iterate together.
    """
    sliced = isinstance(_megatron(optimizer), DistributedOptimizer)
    scale = float(optimizer.get_loss_scale())
    for name, parameter in parameters.items():
        gradient: Tensor = getattr(parameter, "main_grad")  # noqa: B009  megatron-core's own attribute
        if sliced:  # only a replica's own slice of the buffer is summed
            own, held = torch.zeros_like(gradient), _held(optimizer, parameter)
            if held is not None:
                own.view(-1)[held.span] = gradient.reshape(-1)[held.span]
            dist.all_reduce(own, group=dp_group)
            gradient = own
        yield name, gradient / scale


def load_state_tensors(
    optimizer: Any, parameters: Mapping[str, Tensor], read: Callable[[str, str], Tensor], *, steps: int
) -> None:
    """The inverse of `state_tensors`; `steps` is the number of updates taken, which AdamW's bias correction needs."""
    inner = _inner(optimizer)
    # PyTorch's AdamW counts steps for each parameter. Transformer Engine's and apex's FusedAdam, one of which
    # megatron-core takes where it is installed, do so for each group, and know no "step" in a parameter's state.
    counts_each = isinstance(inner, torch.optim.AdamW)
    with torch.no_grad():
        for name, parameter in parameters.items():
            master = read(name, "master").to(parameter.device)
            parameter.copy_(master)
            held = _held(optimizer, parameter)
            if held is None:
                continue
            held.main.copy_(held.cut(master))
            moments = {
                kind: held.cut(read(name, kind).to(parameter.device, torch.float32)).clone() for kind in STATE[1:]
            }
            inner.state[held.main] = {**moments, "step": torch.tensor(float(steps))} if counts_each else moments
    if not counts_each:
        for group in inner.param_groups:  # where it counts from its first step on, and finds no count before
            group["step"] = steps


def loss_scale_state(optimizer: Any) -> dict[str, Any]:
    """State of fp16's dynamic loss scale as plain numbers; empty without one."""
    scaler = getattr(_megatron(optimizer), "grad_scaler", None)
    if scaler is None:
        return {}
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in scaler.state_dict().items()}


def load_loss_scale_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    scaler = getattr(_megatron(optimizer), "grad_scaler", None)
    if scaler is not None and state:
        restored = {**state, "scale": torch.tensor([state["scale"]], device=scaler.scale.device)}
        scaler.load_state_dict(restored)


def _megatron(optimizer: Any) -> Any:
    """The single optimizer inside megatron-core's chain; experts would add more, and there are none."""
    (only,) = optimizer.chained_optimizers
    return only


def _inner(optimizer: Any) -> Any:
    return _megatron(optimizer).optimizer
