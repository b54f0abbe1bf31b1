"""The layer of our GPT: parallel linears of megatron-core or Transformer Engine with our own attention. [s, b, h].

Letters: s sequence, b batch, h hidden, n query heads, g query groups, d head dim; all per tensor-parallel rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from modellink_lora.config.model import ModelConfig
from modellink_lora.device import Device
from modellink_lora.device.base import softmax_attention
from modellink_lora.megatron.differences import mixture_spec, mlp_parts
from modellink_lora.models import alibi
from modellink_lora.models.dropout import Dropout, ResidualAdd
from modellink_lora.models.parts import LayerParts
from modellink_lora.models.recompute import remember


class RMSNorm(torch.nn.Module):
    """RMSNorm that runs under sequence parallelism, which megatron-core's wrapper of torch's own refuses."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        device: Device,
        one_more: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps, self.device, self.one_more = eps, device, one_more
        self.weight = norm_parameter(config, hidden_size, device)

    def forward(self, x: Tensor) -> Tensor:
        return remember(self.normed(x), self.normed, x)

    def normed(self, x: Tensor) -> Tensor:
        return self.device.rms_norm(x, self.weight, self.eps, one_more=self.one_more)


class LayerNorm(torch.nn.Module):
    """LayerNorm with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, device: Device, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = norm_parameter(config, hidden_size, device)
        self.bias = norm_parameter(config, hidden_size, device)

    def forward(self, x: Tensor) -> Tensor:
        return remember(self.normed(x), self.normed, x)

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm_parameter(config: TransformerConfig, size: int, device: Device) -> torch.nn.Parameter:
    """An empty parameter that every tensor-parallel rank holds whole."""
    parameter = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device.name))
    # Each rank sees its own tokens, so a trained norm's gradient would have to be summed over the TP group.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def norm_spec(model: ModelConfig, device: Device) -> ModuleSpec:
    """The norm that this model has everywhere."""
    if model.norm_bias:
        return ModuleSpec(module=LayerNorm, params={"device": device})
    return ModuleSpec(module=RMSNorm, params={"device": device, "one_more": model.add_rmsnorm_offset})


class Swiglu(torch.nn.Module):
    """silu(gate) * up, in place of megatron-core's, which keeps silu(gate) and a copy of up as well."""

    def __init__(self, config: TransformerConfig, *, device: Device) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2 f] -> [s, b, f]"""
        return remember(self.device.swiglu(x), self.device.swiglu, x)


class Gelu(torch.nn.Module):
    """gelu(x), or gelu(gate) * up of x = [gate, up]; exact or in the tanh approximation."""

    def __init__(self, config: TransformerConfig, *, gated: bool, tanh: bool) -> None:
        super().__init__()
        self.gated, self.kind = gated, "tanh" if tanh else "none"

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, f] or [s, b, 2 f] -> [s, b, f]"""
        return remember(self.activated(x), self.activated, x)

    def activated(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(x, approximate=self.kind)
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate=self.kind) * up


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v by the device's fused kernel, or out of single operations where dropout thins it.

    Padding stands on the right, so with a causal flag no real token sees it and no mask is ever built.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: Device,
        tp_rank: int,
        softmax_scale: float | None = None,
        model: ModelConfig | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.device = device
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.dropout = Dropout(config.attention_dropout, rank=tp_rank, cut="features")
        self.shaping: dict[str, Any] = {}  # of the scores, beyond their scale
        if model and model.attn_logit_softcapping:
            self.shaping["softcap"] = model.attn_logit_softcapping
        if model and model.position_embedding_type == "alibi":
            own = alibi.slopes(config.num_attention_heads).chunk(config.tensor_model_parallel_size)[tp_rank]
            self.shaping["slopes"] = own.to(device.name)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n * d]"""
        assert attention_mask is None, "masks are expressed by right padding"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        if self.training and self.dropout.p > 0:  # fused kernels draw masks of their own, which depend on the layout
            thin = self.dropout.probabilities
            out = softmax_attention(q, k, v, causal=True, scale=self.scale, thin=thin, **self.shaping)
        else:
            out = self.device.attention(q, k, v, causal=True, scale=self.scale, **self.shaping)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


class Attention(SelfAttention):
    """megatron-core's, whose output projection may have a bias where the MLP has none, and the other way round."""

    def __init__(self, config: TransformerConfig, *args: Any, dense_bias: bool, **kwargs: Any) -> None:
        if config.add_bias_linear != dense_bias:
            config = copy.copy(config)
            config.add_bias_linear = dense_bias
        super().__init__(config, *args, **kwargs)


class SandwichLayer(TransformerLayer):
    """A layer that also norms what attention and MLP give, before it is added to the residual stream."""

    def __init__(self, config: TransformerConfig, *args: Any, norm: ModuleSpec, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)

        def build() -> torch.nn.Module:
            return norm.module(config, config.hidden_size, config.layernorm_epsilon, **norm.params)

        self.post_attn_norm, self.post_mlp_layernorm = build(), build()
        self.self_attn_bda.behind(self.post_attn_norm)
        self.mlp_bda.behind(self.post_mlp_layernorm)


class Router(TopKRouter):
    """megatron-core's, whose product needs Transformer Engine although it looks as if it could do without."""

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, experts], in the model's dtype like the source; the softmax is in fp32."""
        return F.linear(input, self.weight)


def local_parts(model: ModelConfig, device: Device) -> LayerParts:
    """megatron-core's own linears and our norm."""
    return LayerParts(norm=norm_spec(model, device), column=ColumnParallelLinear, row=RowParallelLinear)


def activation_spec(model: ModelConfig, device: Device) -> ModuleSpec:
    """What an MLP computes between its two linears, gate included."""
    if model.swiglu:
        return ModuleSpec(module=Swiglu, params={"device": device})
    return ModuleSpec(module=Gelu, params={"gated": model.geglu, "tanh": model.gelu_tanh})


def mlp_spec(model: ModelConfig, device: Device, chosen: LayerParts) -> ModuleSpec:
    """The MLP of a layer, or the mixture of experts in its place, each expert such an MLP.

    megatron-core's mixture loops over the experts that a process has, drops no token and keeps no statistics.
    """
    parts = mlp_parts(chosen.column, activation_spec(model, device), chosen.row)
    if not model.num_experts:
        return ModuleSpec(module=MLP, submodules=parts)
    experts = ModuleSpec(module=SequentialMLP, submodules=parts)
    return mixture_spec(experts, parts, Router, shared_gate=model.moe_shared_expert_gate)


def block_spec(
    config: TransformerConfig, model: ModelConfig, device: Device, layers: int, tp_rank: int, parts: LayerParts
) -> TransformerBlockSubmodules:
    """`layers` decoder layers made of `parts`, and the final norm."""
    cut = "positions" if config.sequence_parallel else None
    residual = ModuleSpec(
        module=ResidualAdd,
        params={"p": config.hidden_dropout, "rank": tp_rank, "cut": cut, "scale": model.residual_scale},
    )
    norm = parts.norm
    head_norm = norm if config.qk_layernorm else None
    layer = ModuleSpec(
        module=SandwichLayer if model.post_norm else TransformerLayer,
        params={"norm": norm} if model.post_norm else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_before,
            self_attention=ModuleSpec(
                module=Attention,
                params={"attn_mask_type": AttnMaskType.causal, "dense_bias": model.add_dense_bias},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=ModuleSpec(
                        module=CausalAttention, params={"device": device, "tp_rank": tp_rank, "model": model}
                    ),
                    linear_proj=parts.row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=parts.norm_before,
            mlp=mlp_spec(model, device, parts),
            mlp_bda=residual,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
