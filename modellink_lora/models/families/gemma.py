"""Gemma and Gemma 2: norms by 1 + weight, gated GELU, scaled embeddings; Gemma 2 also caps and norms twice.

The norm weights stay as they are in the files; the 1 is added by the model.
"""

from __future__ import annotations

from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import LLAMA_ROWS, llama_rows, only, read_llama_like
from modellink_lora.models.family import Family

# Gemma's first config.json says gelu and means its tanh approximation, as the later key hidden_activation tells.
_GELU = ("gelu_pytorch_tanh", "gelu")
_SHARED: dict[str, Any] = {
    "activation": _GELU, "swiglu": False, "geglu": True, "gelu_tanh": True, "add_rmsnorm_offset": True,
    "input_embeds_norm": True,
}  # fmt: skip
_KEYS = (*LLAMA_KEYS, "hidden_activation", "use_bidirectional_attention")
_ABSENT = {"tie_word_embeddings": True, "head_dim": 256}


def _check(config: dict[str, Any]) -> None:
    only(config, "hidden_activation", "gelu_pytorch_tanh")
    only(config, "use_bidirectional_attention", False)


def _read_gemma(config: dict[str, Any]) -> ModelConfig:
    _check(config)
    return read_llama_like(config, absent=_ABSENT, **_SHARED)


def _read_gemma2(config: dict[str, Any]) -> ModelConfig:
    _check(config)
    kinds = set(config.get("layer_types") or ["sliding_attention", "full_attention"])
    if odd := sorted(kinds - {"sliding_attention", "full_attention"}):
        raise UserError(f"config.json: layer_types contains {', '.join(odd)}; only full and sliding are supported")
    window = config.get("sliding_window", 4096) if "sliding_attention" in kinds else None
    return read_llama_like(
        config, absent=_ABSENT, **_SHARED, post_norm=True,
        sliding_window=window or 0,  # of every second layer; up to that length both kinds are the same
        query_pre_attn_scalar=float(config.get("query_pre_attn_scalar", 256)),
        attn_logit_softcapping=float(config.get("attn_logit_softcapping", 50.0) or 0.0),
        final_logit_softcapping=float(config.get("final_logit_softcapping", 30.0) or 0.0),
    )  # fmt: skip


GEMMA = Family(name="gemma", hf_model_types=("gemma",), rows=LLAMA_ROWS, read=_read_gemma, keys=_KEYS)
GEMMA2 = Family(
    name="gemma2",
    hf_model_types=("gemma2",),
    rows=llama_rows({
        "post_attn_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }),
    read=_read_gemma2,
    keys=(
        *_KEYS, "layer_types", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
)  # fmt: skip
