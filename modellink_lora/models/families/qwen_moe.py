"""Qwen1.5-MoE and Qwen2-MoE (with a gated expert that sees every token), and Qwen3-MoE, whose attention is Qwen3's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import (
    LLAMA_ROWS,
    QK_NORM_ROWS,
    WINDOW_KEYS,
    expert_rows,
    llama_rows,
    named,
    only,
    read_llama_like,
    required,
    without_mlp,
)
from modellink_lora.models.family import Family, TensorRow

_KEYS = (
    *LLAMA_KEYS, *WINDOW_KEYS, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    "mlp_only_layers", "norm_topk_prob",
)  # fmt: skip


def _read_qwen2(config: dict[str, Any]) -> ModelConfig:
    config = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
              "shared_expert_intermediate_size": 5632, "qkv_bias": True, **config}  # fmt: skip
    return read_llama_like(
        config,
        absent={"num_key_value_heads": 16},
        add_qkv_bias=bool(config["qkv_bias"]),
        moe_shared_expert_intermediate_size=required(config, "shared_expert_intermediate_size"),
        moe_shared_expert_gate=True,
        **_experts(config),
    )


def _read_qwen3(config: dict[str, Any]) -> ModelConfig:
    config = named(config, "num_experts", "num_local_experts")  # transformers 5 writes the second name
    config = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, **config}
    return read_llama_like(config, absent={"num_key_value_heads": 4}, qk_layernorm=True, **_experts(config))


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What both say in the same way: every layer is a mixture, attention is full."""
    only(config, "decoder_sparse_step", 1)
    only(config, "use_sliding_window", False)
    if dense := config.get("mlp_only_layers"):
        raise UserError(f"config.json: mlp_only_layers {dense} is not supported; every layer must have experts")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError("config.json: layer_types contains others than full_attention, which is all that is supported")
    return {
        "num_experts": required(config, "num_experts"),
        "moe_router_topk": required(config, "num_experts_per_tok"),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_ffn_hidden_size": required(config, "moe_intermediate_size"),
    }


def _rows(attention: tuple[TensorRow, ...], *, shared: str | None) -> tuple[TensorRow, ...]:
    experts = expert_rows("mlp.gate", "mlp.experts.#", gate_up="{gate,up}_proj", down="down_proj", shared=shared)
    return without_mlp(attention) + experts


QWEN2_MOE = Family(
    name="qwen2-moe",
    hf_model_types=("qwen2_moe",),
    rows=_rows(llama_rows(biased=("qkv",)), shared="mlp.shared_expert"),
    read=_read_qwen2,
    keys=(*_KEYS, "shared_expert_intermediate_size", "qkv_bias"),
)
QWEN3_MOE = Family(
    name="qwen3-moe",
    hf_model_types=("qwen3_moe",),
    rows=_rows(LLAMA_ROWS + QK_NORM_ROWS, shared=None),
    read=_read_qwen3,
    keys=(*_KEYS, "num_local_experts"),
)
