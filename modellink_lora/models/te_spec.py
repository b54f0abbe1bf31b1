"""The parts of a layer that Transformer Engine gives instead of megatron-core's own linears and our norm.

Two differences from the local parts matter to the rest of the program. The linears behind a norm hold that norm
(`layer_norm_weight` in linear_qkv and linear_fc1; checkpoint/names.py gives it the name that it has in files), and a
norm is rounded once, after its weight, where models/spec.py rounds before it as transformers does. Attention, dropout,
activation and residual stay ours (docs/adr/0014).
"""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.device import Device
from modellink_lora.models.parts import LayerParts

_FLAG = "--transformer-impl transformer_engine"


def te_parts() -> LayerParts:
    """Call `check_transformer_engine` before."""
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return LayerParts(
        norm=ModuleSpec(module=TENorm),  # LayerNorm or RMSNorm, with 1 + weight or without, by megatron-core's config
        column=TELayerNormColumnParallelLinear,
        row=TERowParallelLinear,
        norms_inside=True,
    )


def check_transformer_engine(model: ModelConfig, device: Device, dtype: str) -> None:
    """Raise UserError when Transformer Engine cannot run this model here."""
    if not device.runs_transformer_engine:
        raise UserError(f"{_FLAG} needs a CUDA device, this one is {device.name}: give --transformer-impl local")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise UserError(
            f"{_FLAG}: the package cannot be imported; install it with `pip install --no-build-isolation "
            "transformer-engine[pytorch]`, or give --transformer-impl local"
        )
    if dtype == "fp32" and device.name == "cuda":
        raise UserError(
            f"{_FLAG} multiplies fp32 matrices in TF32, with 10 bits behind the point: give --bf16 or --fp16, "
            "or --transformer-impl local"
        )
    if model.num_experts:
        raise UserError(
            f"{_FLAG} is not offered for mixtures of experts, this model has {model.num_experts} a layer: "
            "give --transformer-impl local"
        )
