"""Full shape of every Megatron tensor of a model, from its dimensions. Letters as in layouts.py."""

from __future__ import annotations

import re

from modellink_lora.config.model import ModelConfig


def full_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the tensor of global Megatron name `name` on one process, vocabulary padded; KeyError if unknown."""
    h, f, vocab = config.hidden_size, config.ffn_hidden_size, config.padded_vocab_size
    qkv = config.query_width + 2 * config.kv_width
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocab, h),
        "input_layernorm.weight": (h,),
        "self_attention.linear_qkv.weight": (qkv, h),
        "self_attention.linear_qkv.bias": (qkv,),
        "self_attention.linear_proj.weight": (h, config.query_width),
        "self_attention.q_layernorm.weight": (config.kv_channels,),
        "self_attention.k_layernorm.weight": (config.kv_channels,),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.linear_fc1.weight": (2 * f, h),
        "mlp.linear_fc2.weight": (h, f),
        "decoder.final_layernorm.weight": (h,),
        "output_layer.weight": (vocab, h),
    }
    return shapes[re.sub(r"^decoder\.layers\.\d+\.", "", name)]
