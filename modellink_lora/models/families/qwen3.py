"""Qwen3 (dense): Llama with a norm on every query and key head, and a head width of its own."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import (
    LLAMA_ROWS,
    QK_NORM_ROWS,
    WINDOW_KEYS,
    read_llama_like,
    refuse_mixed_windows,
)
from modellink_lora.models.family import Family


def _read_config(config: dict[str, Any]) -> ModelConfig:
    refuse_mixed_windows(config)
    return read_llama_like(config, absent={"num_key_value_heads": 32, "head_dim": 128}, qk_layernorm=True)


QWEN3 = Family(
    name="qwen3",
    hf_model_types=("qwen3",),
    rows=LLAMA_ROWS + QK_NORM_ROWS,
    read=_read_config,
    keys=(*LLAMA_KEYS, *WINDOW_KEYS),
    aliases=("llama2",),
)
