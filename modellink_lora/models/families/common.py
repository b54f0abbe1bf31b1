"""What the Llama-shaped families share: tensor table and reading of config.json. A family adds its differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.family import TensorRow
from modellink_lora.models.layouts import QKV, GateUp, Replicated, Row, Vocab

_MEGATRON, _HF = "decoder.layers.*.", "model.layers.*."

LLAMA_ROWS = (
    TensorRow("embedding.word_embeddings.weight", Vocab, "model.embed_tokens.weight"),
    TensorRow(_MEGATRON + "input_layernorm.weight", Replicated, _HF + "input_layernorm.weight"),
    TensorRow(_MEGATRON + "self_attention.linear_qkv.weight", QKV, _HF + "self_attn.{q,k,v}_proj.weight"),
    TensorRow(_MEGATRON + "self_attention.linear_proj.weight", Row, _HF + "self_attn.o_proj.weight"),
    TensorRow(_MEGATRON + "pre_mlp_layernorm.weight", Replicated, _HF + "post_attention_layernorm.weight"),
    TensorRow(_MEGATRON + "mlp.linear_fc1.weight", GateUp, _HF + "mlp.{gate,up}_proj.weight"),
    TensorRow(_MEGATRON + "mlp.linear_fc2.weight", Row, _HF + "mlp.down_proj.weight"),
    TensorRow("decoder.final_layernorm.weight", Replicated, "model.norm.weight"),
    TensorRow("output_layer.weight", Vocab, "lm_head.weight", when="untie_embeddings_and_output_weights"),
)
QKV_BIAS_ROWS = (
    TensorRow(
        _MEGATRON + "self_attention.linear_qkv.bias", QKV, _HF + "self_attn.{q,k,v}_proj.bias", when="add_qkv_bias"
    ),
)
QK_NORM_ROWS = tuple(
    TensorRow(
        _MEGATRON + f"self_attention.{x}_layernorm.weight",
        Replicated,
        _HF + f"self_attn.{x}_norm.weight",
        when="qk_layernorm",
    )
    for x in ("q", "k")
)

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Values that transformers' PretrainedConfig and the four config classes take when config.json leaves the key out.
_ABSENT = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def read_llama_like(
    config: Mapping[str, Any], *, absent: Mapping[str, Any] | None = None, sliding_window: int = 0, **fields: Any
) -> ModelConfig:
    """The ModelConfig of a Llama-shaped config.json.

    Args:
        absent: what this family's config class takes for a key that config.json leaves out.
        fields: further ModelConfig fields that the family sets.
    Raises:
        UserError: a key is missing, or asks for something the model here does not compute.
    """
    known: dict[str, Any] = {**_ABSENT, **(absent or {}), **config}
    get = known.get
    only(config, "hidden_act", "silu", "swish")
    for key in ("attention_bias", "mlp_bias"):
        only(config, key, False)
    heads = _required(config, "num_attention_heads")
    hidden = _required(config, "hidden_size")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UserError(f"config.json: dtype {dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
    return ModelConfig(
        num_layers=_required(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=_required(config, "intermediate_size"),
        num_query_groups=get("num_key_value_heads") or heads,
        kv_channels=get("head_dim") or hidden // heads,
        max_position_embeddings=_required(config, "max_position_embeddings"),
        vocab_size=_required(config, "vocab_size"),
        normalization="RMSNorm",
        norm_epsilon=float(known["rms_norm_eps"]),
        swiglu=True,
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=not get("tie_word_embeddings"),
        attention_dropout=float(get("attention_dropout") or 0.0),
        init_method_std=float(known["initializer_range"]),
        params_dtype=_DTYPES[dtype],
        hf_model_type=str(config["model_type"]),
        sliding_window=sliding_window,
        **read_rope(config),
        **fields,
    )


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig fields of the rotary embedding.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one dictionary `rope_parameters`.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    for key, holder in (("partial_rotary_factor", config), ("partial_rotary_factor", rope)):
        only(holder, key, 1, 1.0)
    fields: dict[str, Any] = {"rotary_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"config.json: {where}.rope_type {kind!r} is not supported; supported are default, linear, llama3"
        )

    def number(key: str) -> float:
        value = rope.get(key, config.get(key))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(f"config.json: {where} of type {kind} needs a positive {key}, it has {value!r}")
        return float(value)

    fields |= {"rope_scaling_type": kind, "rope_scaling_factor": number("factor")}
    if kind == "llama3":
        fields |= {
            "low_freq_factor": number("low_freq_factor"),
            "high_freq_factor": number("high_freq_factor"),
            "original_max_position_embeddings": int(number("original_max_position_embeddings")),
        }
    return fields


def refuse_mixed_windows(config: Mapping[str, Any]) -> None:
    """Qwen2 and Qwen3 may attend through a window in some layers only; the model here has one kind of layer."""
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        odd = sorted(set(kinds) - {"full_attention"})
        raise UserError(f"config.json: layer_types contains {', '.join(odd)}; only full_attention is supported")
    first = config.get("max_window_layers", 28)
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    if kinds is None and windowed and first < _required(config, "num_hidden_layers"):
        raise UserError(
            f"config.json: use_sliding_window true with max_window_layers {first} gives some layers an attention "
            "window; only full attention is supported for this family"
        )


def only(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """Raise UserError unless config[key] is absent, null or one of `allowed`."""
    value = config.get(key)
    if value is not None and value not in allowed:
        raise UserError(f"config.json: {key} {value!r} is not supported; this version needs {allowed[0]!r}")


def _required(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, expected a whole number of at least 1")
    return value
