"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v. The bias goes with the model type, config.json is silent."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import WINDOW_KEYS, llama_rows, read_llama_like, refuse_mixed_windows
from modellink_lora.models.family import Family


def _read_config(config: dict[str, Any]) -> ModelConfig:
    refuse_mixed_windows(config)
    return read_llama_like(config, absent={"num_key_value_heads": 32}, add_qkv_bias=True)


QWEN2 = Family(
    name="qwen2",
    hf_model_types=("qwen2",),
    rows=llama_rows(biased=("qkv",)),
    read=_read_config,
    keys=(*LLAMA_KEYS, *WINDOW_KEYS),
    aliases=("llama2", "qwen1.5", "qwen2.5"),
)
