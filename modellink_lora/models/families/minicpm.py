"""MiniCPM 1B and 2B: Llama's tensors with scaled embeddings, residual branches and logits."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import LLAMA_ROWS, only, read_llama_like
from modellink_lora.models.family import Family


def _read_config(config: dict[str, Any]) -> ModelConfig:
    only(config, "num_experts", 0)
    return read_llama_like(
        config,
        absent={"tie_word_embeddings": True},
        scale_emb=float(config.get("scale_emb", 1)),
        scale_depth=float(config.get("scale_depth", 1)),
        dim_model_base=int(config.get("dim_model_base", 1)),
    )


MINICPM = Family(
    name="minicpm", hf_model_types=("minicpm",), rows=LLAMA_ROWS, read=_read_config,
    keys=(*LLAMA_KEYS, "num_experts", "scale_emb", "scale_depth", "dim_model_base"),
)  # fmt: skip
