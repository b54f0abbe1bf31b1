"""The layer of our GPT: megatron-core's parallel linears with our own norm and attention. [s, b, h] throughout.

Letters: s sequence, b batch, h hidden, n query heads, g query groups, d head dim; all per tensor-parallel rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from modellink_lora.device import Device
from modellink_lora.device.base import softmax_attention
from modellink_lora.models.dropout import Dropout, ResidualAdd
from modellink_lora.models.recompute import remember


class RMSNorm(torch.nn.Module):
    """RMSNorm that runs under sequence parallelism, which megatron-core's wrapper of torch's own refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, device: Device, **_: Any) -> None:
        super().__init__()
        self.eps, self.device = eps, device
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device.name))
        # Each rank sees its own tokens, so a trained norm's gradient would have to be summed over the TP group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return remember(self.normed(x), self.normed, x)

    def normed(self, x: Tensor) -> Tensor:
        return self.device.rms_norm(x, self.weight, self.eps)


class Swiglu(torch.nn.Module):
    """silu(gate) * up, in place of megatron-core's, which keeps silu(gate) and a copy of up as well."""

    def __init__(self, config: TransformerConfig, *, device: Device) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2 f] -> [s, b, f]"""
        return remember(self.device.swiglu(x), self.device.swiglu, x)


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v by the device's fused kernel, or out of single operations where dropout thins it.

    Padding stands on the right, so with a causal flag no real token sees it and no mask is ever built.
    """

    def __init__(
        self, config: TransformerConfig, *, device: Device, tp_rank: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.device = device
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.dropout = Dropout(config.attention_dropout, rank=tp_rank, cut="features")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n * d]"""
        assert attention_mask is None, "masks are expressed by right padding"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        if self.training and self.dropout.p > 0:  # fused kernels draw masks of their own, which depend on the layout
            out = softmax_attention(q, k, v, causal=True, scale=self.scale, thin=self.dropout.probabilities)
        else:
            out = self.device.attention(q, k, v, causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def block_spec(config: TransformerConfig, device: Device, layers: int, tp_rank: int) -> TransformerBlockSubmodules:
    """`layers` decoder layers and the final norm."""
    cut = "positions" if config.sequence_parallel else None
    residual = ModuleSpec(module=ResidualAdd, params={"p": config.hidden_dropout, "rank": tp_rank, "cut": cut})
    norm = ModuleSpec(module=RMSNorm, params={"device": device})
    head_norm = norm if config.qk_layernorm else None
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=functools.partial(CausalAttention, device=device, tp_rank=tp_rank),
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear,
                    activation_func=ModuleSpec(module=Swiglu, params={"device": device}),
                    linear_fc2=RowParallelLinear,
                ),
            ),
            mlp_bda=residual,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
