"""Mistral 7B: Llama's tensors; v0.1 attends through a sliding window, later versions say null."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import LLAMA_ROWS, read_llama_like
from modellink_lora.models.family import Family


def _read_config(config: dict[str, Any]) -> ModelConfig:
    window = config.get("sliding_window", 4096)  # 4096 is MistralConfig's value for an absent key, null means none
    return read_llama_like(config, absent={"num_key_value_heads": 8}, sliding_window=window or 0)


MISTRAL = Family(
    name="mistral", hf_model_types=("mistral",), rows=LLAMA_ROWS, read=_read_config,
    keys=(*LLAMA_KEYS, "sliding_window"), aliases=("llama2",),
)  # fmt: skip
