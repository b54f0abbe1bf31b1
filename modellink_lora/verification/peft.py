"""The first step's loss and gradients again, by transformers and PEFT in one process: nothing of ours takes part."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.rank_files import HF_FILES
from modellink_lora.config.errors import UserError
from modellink_lora.config.train import TrainConfig
from modellink_lora.data.batches import Batch
from modellink_lora.device import Device
from modellink_lora.models.build import DTYPES
from modellink_lora.training.assembly import Inputs


def obstacle(inputs: Inputs, dtype: str, device: Device) -> str | None:
    """Why the comparison cannot be made here, or None."""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if not inputs.base.root or not (inputs.base.root / HF_FILES / "config.json").is_file():
        return f"the base keeps no {HF_FILES}/config.json"
    if inputs.base.config.hf_model_type not in _known_to_transformers():
        return f"transformers has no model of type {inputs.base.config.hf_model_type}"
    needed = 2 * inputs.base.config.parameter_count() * DTYPES[dtype].itemsize
    free = device.free_memory()
    if needed > free:
        return f"the whole model needs {needed / 2**30:.1f} GiB here, {free / 2**30:.1f} are free"
    return None


def _known_to_transformers() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING)


def peft_gradients(
    inputs: Inputs, train: TrainConfig, batches: Sequence[Batch], start: Callable[[str], Tensor], device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients by global name, without dropout.

    Args:
        batches: the micro-batches of all replicas.
        start: reads the full factors by global name.
    """
    model = _model(inputs, train, device)
    factors = _adapt(model, inputs, start)
    parameters = {parameter for parts in factors.values() for parameter in parts}
    sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}
    scale = train.loss_scale or 1.0  # fp16 loses small gradients without it
    total, count = 0.0, 0.0
    for batch in batches:
        tokens, labels, mask = (batch[name].to(device) for name in ("tokens", "labels", "loss_mask"))
        if not mask.any():
            continue
        logits = model(input_ids=tokens, use_cache=False).logits.float()  # [b, s, v]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss, trained = (each * mask.flatten()).sum(), mask.sum().item()
        if train.loss_reduction == "micro-batch":
            loss, trained = loss / trained, 1.0
        (loss * scale).backward()
        total, count = total + loss.item(), count + trained
        for parameter in parameters:  # summed in fp32, as ours are
            sums[parameter] += parameter.grad.float() / scale  # type: ignore[union-attr]
            parameter.grad = None
    layouts = {f"{x.name}.lora_{kind}": layout for x in inputs.linears
               for kind, layout in (("A", x.a_layout), ("B", x.b_layout))}  # fmt: skip
    full = {}
    for name, parts in factors.items():
        full[name] = layouts[name].fuse([sums[part].cpu() / count for part in parts])
    return total / count, full


def _model(inputs: Inputs, train: TrainConfig, device: torch.device) -> Any:
    """transformers' own model with the base's weights, frozen, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    base = inputs.base
    assert base.root
    logging.disable_progress_bar()
    state: dict[str, Tensor] = {}
    for spec in base.family.tensors(base.config):
        full = base.weights.read(spec.name).to(DTYPES[train.dtype])
        state.update(zip(spec.hf, spec.layout.split(full), strict=True))
    try:
        config = AutoConfig.from_pretrained(base.root / HF_FILES, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except ValueError as error:
        raise UserError(f"{base.root / HF_FILES}: transformers has no such model of its own, to compare with "
                        f"({' '.join(str(error).split())[:200]})") from None  # fmt: skip
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=DTYPES[train.dtype])
    return model.to(device).requires_grad_(False).eval()


def _adapt(model: Any, inputs: Inputs, start: Callable[[str], Tensor]) -> dict[str, list[torch.nn.Parameter]]:
    """Put PEFT's LoRA on the projections; our global name -> its parameters there.

    A fused layer has one A: its projections (q, k, v and gate, up) hold the same parameter.
    """
    from peft import LoraConfig, get_peft_model

    family, config = inputs.base.family, inputs.base.config
    paths = {x.name: [part.removesuffix(".weight") for part in family.tensor(f"{x.name}.weight", config).hf]
             for x in inputs.linears}  # fmt: skip
    targets = [path for found in paths.values() for path in found]
    get_peft_model(model, LoraConfig(r=1, target_modules=targets), autocast_adapter_dtype=False)
    weight = next(model.parameters())
    dtype = DTYPES[inputs.lora.dtype] if inputs.lora.dtype else weight.dtype
    factors: dict[str, list[torch.nn.Parameter]] = {}
    for linear in inputs.linears:
        modules = [model.get_submodule(path) for path in paths[linear.name]]
        a = torch.nn.Parameter(start(f"{linear.name}.lora_A").to(weight.device, dtype))
        full = linear.b_layout.split(start(f"{linear.name}.lora_B"))
        b = [torch.nn.Parameter(part.to(weight.device, dtype)) for part in full]
        for module, own in zip(modules, b, strict=True):
            module.scaling["default"] = linear.scaling
            module.lora_A["default"].weight, module.lora_B["default"].weight = a, own
        factors |= {f"{linear.name}.lora_A": [a], f"{linear.name}.lora_B": b}
    return factors
