"""Qwen, the first version: q, k and v stacked with a bias, gate and up named the other way round."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families.common import ends, named, only, required, rows
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import StackedQKV

# The first published config.json of Qwen-7B names these as GPT-2 does.
_FIRST = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size", "n_positions": "max_position_embeddings", "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}  # fmt: skip


def _read_config(config: dict[str, Any]) -> ModelConfig:
    for old, new in _FIRST.items():
        config = named(config, new, old)
    for key, values in (("no_bias", (True,)), ("rotary_pct", (1.0, 1)), ("scale_attn_weights", (True,)),
                        ("apply_residual_connection_post_layernorm", (False,)),
                        ("emb_dropout_prob", (0.0, 0))):  # fmt: skip
        only(config, key, *values)
    length = required(config, "seq_length")
    fields: dict[str, Any] = {}
    if config.get("use_dynamic_ntk", True) or config.get("use_logn_attn", True):  # both act behind seq_length only
        fields = {"rope_scaling_type": "dynamic", "original_max_position_embeddings": length}
    return ModelConfig(
        num_layers=required(config, "num_hidden_layers"),
        hidden_size=required(config, "hidden_size"),
        num_attention_heads=required(config, "num_attention_heads"),
        ffn_hidden_size=required(config, "intermediate_size") // 2,  # counts gate and up together
        kv_channels=required(config, "kv_channels"),
        max_position_embeddings=config.get("max_position_embeddings") or length,
        vocab_size=required(config, "vocab_size"),
        normalization="RMSNorm",
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        swiglu=True,
        position_embedding_type="rope",
        rotary_base=float(config.get("rotary_emb_base", 10000)),
        add_qkv_bias=True,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        attention_dropout=float(config.get("attn_dropout_prob", 0.0)),
        **ends(config),
        **fields,
    )


QWEN = Family(
    name="qwen",
    hf_model_types=("qwen",),
    rows=rows(
        embedding="transformer.wte",
        layer="transformer.h.*.",
        norm="transformer.ln_f",
        head="lm_head",
        modules={
            "input_norm": "ln_1",
            "qkv": "attn.c_attn",
            "proj": "attn.c_proj",
            "pre_mlp_norm": "ln_2",
            "fc1": "mlp.w{2,1}",
            "fc2": "mlp.c_proj",
        },
        layouts={"qkv": StackedQKV},
        biased=("qkv",),
    ),
    read=_read_config,
    keys=(
        *_FIRST,
        *_FIRST.values(),
        "no_bias",
        "rotary_pct",
        "scale_attn_weights",
        "seq_length",
        "use_dynamic_ntk",
        "use_logn_attn",
        "kv_channels",
        "vocab_size",
        "padded_vocab_size",
        "layer_norm_epsilon",
        "rotary_emb_base",
        "apply_residual_connection_post_layernorm",
    ),
)
