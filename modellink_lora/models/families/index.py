"""Index 1.9B: Llama's tensors; where norm_head is set, the rows of the head are used at length 1."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import LLAMA_ROWS, read_llama_like
from modellink_lora.models.family import Family


def _read_config(config: dict[str, Any]) -> ModelConfig:
    return read_llama_like(config, normalize_head=bool(config.get("norm_head", False)))


INDEX = Family(
    name="index", hf_model_types=("index",), rows=LLAMA_ROWS, read=_read_config,
    keys=(*LLAMA_KEYS, "norm_head"), aliases=("llama2",),
)  # fmt: skip
