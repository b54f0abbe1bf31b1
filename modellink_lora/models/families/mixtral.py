"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import LLAMA_ROWS, expert_rows, named, read_llama_like, required, without_mlp
from modellink_lora.models.family import Family


def _read_config(config: dict[str, Any]) -> ModelConfig:
    config = named(config, "num_local_experts", "num_experts")
    config = {"rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, **config}  # MixtralConfig's own
    return read_llama_like(
        config,
        absent={"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        sliding_window=config.get("sliding_window") or 0,
        num_experts=required(config, "num_local_experts"),
        moe_router_topk=required(config, "num_experts_per_tok"),
    )


MIXTRAL = Family(
    name="mixtral",
    hf_model_types=("mixtral",),
    rows=without_mlp(LLAMA_ROWS)
    + expert_rows("block_sparse_moe.gate", "block_sparse_moe.experts.#", gate_up="w{1,3}", down="w2"),
    read=_read_config,
    keys=(*LLAMA_KEYS, "sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"),
)
