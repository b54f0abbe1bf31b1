"""megatron-core's AdamW over fp32 masters, and its state as plain tensors by parameter name.

The state of one parameter is its fp32 master and two fp32 moments, each of the parameter's own shape, so a checkpoint
can gather and cut them exactly as it does the parameter (docs/adr/0003).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from modellink_lora.config.train import TrainConfig
from modellink_lora.models.build import DTYPES, GPT

STATE = ("master", "exp_avg", "exp_avg_sq")


def wrap_data_parallel(model: GPT) -> DistributedDataParallel:
    """Gradients of adapters in one fp32 buffer, averaged over replicas once per step."""
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, settings, model)


def make_optimizer(config: TrainConfig, model: DistributedDataParallel) -> Any:
    """AdamW over the trainable parameters of `model`, wired into megatron-core's schedule."""
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
    )
    optimizer = get_megatron_optimizer(settings, [model])
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


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


def _main(parameter: Tensor) -> Tensor:
    """The fp32 tensor that AdamW updates: the master of a low-precision parameter, else the parameter itself."""
    master = getattr(parameter, "main_param", None)
    return parameter if master is None else master


def state_tensors(optimizer: Any, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter name, one of STATE, local tensor) for every parameter; moments are zero before the first step."""
    for name, parameter in parameters.items():
        main = _main(parameter)
        state = _inner(optimizer).state.get(main, {})
        yield name, "master", main.detach()
        for moment in STATE[1:]:
            yield name, moment, state.get(moment, torch.zeros_like(main, dtype=torch.float32))


def load_state_tensors(
    optimizer: Any, parameters: Mapping[str, Tensor], read: Callable[[str, str], Tensor], *, steps: int
) -> None:
    """The inverse of `state_tensors`; `steps` is the number of updates taken, which AdamW's bias correction needs."""
    inner = _inner(optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            main = _main(parameter)
            main.copy_(read(name, "master"))
            parameter.copy_(main)
            moments = {m: read(name, m).to(device=main.device, dtype=torch.float32).clone() for m in STATE[1:]}
            inner.state[main] = {**moments, "step": torch.tensor(float(steps))}
    for group in inner.param_groups:
        if "step" in group:  # fused AdamW of Transformer Engine and Apex counts per group
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
