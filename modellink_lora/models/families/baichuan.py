"""Baichuan 1 and 2: Llama with q, k and v stacked in W_pack; ALiBi at 13B; Baichuan 2 norms the rows of its head.

The head is stored as published and normed by the model, so conversion keeps its bytes.
"""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import llama_rows, read_llama_like
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import StackedQKV

# All four say model_type baichuan. What tells them apart is what differs between their published files:
_VOCABULARY_2 = 125696  # of both models of Baichuan 2; the first ones have 64000 tokens
_WIDTH_13B = 5120


def _read_config(config: dict[str, Any]) -> ModelConfig:
    length = config.get("max_position_embeddings") or config.get("model_max_length")
    fields: dict[str, Any] = {"normalize_head": config.get("vocab_size") == _VOCABULARY_2 or "z_loss_weight" in config}
    # with ALiBi there are no positions to count: the 13B models have model_max_length only
    if "max_position_embeddings" not in config or config.get("hidden_size") == _WIDTH_13B:
        fields["position_embedding_type"] = "alibi"
    return read_llama_like({**config, "max_position_embeddings": length}, **fields)


BAICHUAN = Family(
    name="baichuan",
    hf_model_types=("baichuan",),
    rows=llama_rows({"qkv": "self_attn.W_pack"}, layouts={"qkv": StackedQKV}),
    read=_read_config,
    keys=(*LLAMA_KEYS, "model_max_length", "z_loss_weight"),
    aliases=("baichuan2",),
)
