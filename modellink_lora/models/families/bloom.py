"""BLOOM: ALiBi, LayerNorm, a norm on the embedding, biases everywhere, a GELU without gate."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families.common import ends, named, only, required, rows
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import Column, GroupedQKV


def _read_config(config: dict[str, Any]) -> ModelConfig:
    only(config, "apply_residual_connection_post_layernorm", False)
    only(config, "hidden_dropout", 0.0)
    only(config, "attention_dropout", 0.0)
    # BloomConfig knows both spellings of each
    for names in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), ("hidden_size", "n_embed")):
        config = named(config, *names)
    return ModelConfig(
        num_layers=required(config, "num_hidden_layers"),
        hidden_size=required(config, "hidden_size"),
        num_attention_heads=required(config, "num_attention_heads"),
        max_position_embeddings=config.get("seq_length") or 2048,  # what it was trained on; ALiBi has no end of its own
        vocab_size=required(config, "vocab_size"),
        normalization="LayerNorm",
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        gelu_tanh=True,
        position_embedding_type="alibi",
        embed_layernorm=True,
        add_qkv_bias=True,
        add_dense_bias=True,
        add_mlp_bias=True,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", True),
        **ends(config),
    )


BLOOM = Family(
    name="bloom",
    hf_model_types=("bloom",),
    rows=rows(
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        layer="transformer.h.*.",
        norm="transformer.ln_f",
        head="lm_head",
        modules={
            "input_norm": "input_layernorm",
            "qkv": "self_attention.query_key_value",
            "proj": "self_attention.dense",
            "pre_mlp_norm": "post_attention_layernorm",
            "fc1": "mlp.dense_h_to_4h",
            "fc2": "mlp.dense_4h_to_h",
        },
        layouts={"qkv": GroupedQKV, "fc1": Column},
        biased=("qkv", "proj", "fc1", "fc2"),
        norm_bias=True,
    ),
    read=_read_config,
    keys=(
        "apply_residual_connection_post_layernorm",
        "hidden_dropout",
        "attention_dropout",
        "num_hidden_layers",
        "n_layer",
        "num_attention_heads",
        "n_head",
        "hidden_size",
        "n_embed",
        "seq_length",
        "vocab_size",
        "layer_norm_epsilon",
        "n_inner",
        "intermediate_size",
        "num_key_value_heads",
        "max_position_embeddings",  # BloomModel reads none
    ),
    optional_prefix="transformer.",
)
