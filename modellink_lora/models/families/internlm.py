"""InternLM (Llama with biases on the attention's linears) and InternLM2 (q, k and v kept grouped in one tensor)."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import llama_rows, only, read_llama_like, rows
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import GroupedQKV


def _read_internlm(config: dict[str, Any]) -> ModelConfig:
    bias, rotary = bool(config.get("bias", True)), config.get("rotary") or {}
    kind = rotary.get("type", "origin")
    only({"rotary.type": kind}, "rotary.type", "origin", "dynamic")
    rope: dict[str, Any] = {"rope_theta": rotary["base"]} if "base" in rotary else {}
    if kind == "dynamic":
        rope["rope_scaling"] = {"type": kind, "factor": rotary.get("scaling_factor", 1.0)}
    return read_llama_like({**config, **rope}, add_qkv_bias=bias, add_dense_bias=bias)


def _read_internlm2(config: dict[str, Any]) -> ModelConfig:
    bias = bool(config.get("bias", True))
    return read_llama_like(config, add_qkv_bias=bias, add_dense_bias=bias)


INTERNLM = Family(
    name="internlm",
    hf_model_types=("internlm",),
    rows=llama_rows(biased=("qkv", "proj")),
    read=_read_internlm,
    keys=(*LLAMA_KEYS, "bias", "rotary"),
    aliases=("llama2",),
)
INTERNLM2 = Family(
    name="internlm2",
    hf_model_types=("internlm2",),
    rows=rows(
        embedding="model.tok_embeddings",
        layer="model.layers.*.",
        norm="model.norm",
        head="output",
        modules={
            "input_norm": "attention_norm",
            "qkv": "attention.wqkv",
            "proj": "attention.wo",
            "pre_mlp_norm": "ffn_norm",
            "fc1": "feed_forward.w{1,3}",
            "fc2": "feed_forward.w2",
        },
        layouts={"qkv": GroupedQKV},
        biased=("qkv", "proj"),
    ),
    read=_read_internlm2,
    keys=(*LLAMA_KEYS, "bias"),
    aliases=("internlm25",),
)
