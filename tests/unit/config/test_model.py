"""Model dimensions: what is derived, what is refused, and which flags may stand beside a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig, pad_vocab

NEEDED: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128, "vocab_size": 259,
    "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope",
}  # fmt: skip


def test_sizes_that_are_left_out_follow_from_the_others() -> None:
    config = ModelConfig(**NEEDED, make_vocab_size_divisible_by=128)
    assert (config.num_query_groups, config.kv_channels, config.padded_vocab_size) == (4, 16, 384)
    assert config.ffn_hidden_size == 128, "two thirds of four times the width, rounded down to 64"
    assert (config.query_width, config.kv_width) == (64, 64)
    assert pad_vocab(32000, 128) == 32000 and pad_vocab(32001, 128) == 32128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "--num-layers is missing: give it, or --load a checkpoint"),
        ({"num_query_groups": 3}, "4 heads cannot share 3 query groups evenly"),
        ({"padded_vocab_size": 258}, "258 is below the vocabulary of 259"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute: give rope or alibi"),
        ({"geglu": True}, "--swiglu together with --geglu"),
        ({"gelu_tanh": True}, "--gelu-tanh together with --swiglu"),
        ({"rotary_percent": 0.3}, "--rotary-percent 0.3 of 16 channels is not a whole number of pairs"),
        ({"rotary_percent": 1.5}, "--rotary-percent 1.5"),
        ({"position_embedding_type": "alibi", "rotary_interleaved": True}, "rotary settings together with"),
        ({"normalization": "LayerNorm", "add_rmsnorm_offset": True}, "--add-rmsnorm-offset without"),
        ({"normalization": "LayerNorm", "qk_layernorm": True}, "--qk-layernorm or --post-norm without"),
        ({"normalization": "LayerNorm", "post_norm": True}, "--qk-layernorm or --post-norm without"),
        ({"add_dense_bias": True}, "--add-dense-bias without --add-qkv-bias"),
        ({"input_embeds_norm": True, "scale_emb": 2.0}, "--input-embeds-norm together with --scale-emb"),
        ({"normalize_head": True}, "a normalized output layer that is also the embedding"),
        ({"final_logit_softcapping": -1.0}, "--final-logit-softcapping -1.0: must be at least 0"),
        ({"num_experts": 4, "swiglu": False}, "experts without --swiglu"),
        ({"num_experts": 4, "add_mlp_bias": True}, "experts without --swiglu, or with MLP biases"),
        ({"num_experts": 2, "moe_router_topk": 3}, "--moe-router-topk 3 of 2 experts"),
        ({"num_experts": 2, "moe_router_topk": 1}, "--moe-router-topk 1 without --moe-router-pre-softmax"),
        ({"moe_ffn_hidden_size": 64}, "without --num-experts"),
        ({"num_experts": 2, "moe_shared_expert_gate": True}, "--moe-shared-expert-gate without"),
    ],
)
def test_models_that_cannot_be_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**{**NEEDED, **changes})


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("num_layers", 3, "--num-layers 3 contradicts --load x, which says 2: remove the flag"),
        ("rotary_base", 500000.0, "--rotary-base 500000.0 contradicts --load x, which says 10000.0"),
        ("norm_epsilon", 1e-6, "--norm-epsilon 1e-06 contradicts --load x, which says 1e-05"),
        ("untie_embeddings_and_output_weights", True, "--untie-embeddings-and-output-weights True contradicts"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(name: str, value: Any, shown: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**NEEDED).with_flags({name: value}, "--load x")
    assert str(error.value).startswith(shown)


def test_flags_that_agree_or_change_nothing_computed_are_taken() -> None:
    config = ModelConfig(**NEEDED)
    agreeing = {"num_layers": 2, "rotary_base": 10000.0 * (1 + 1e-9), "swiglu": True}
    assert config.with_flags(agreeing, "--load x") == config
    freed = config.with_flags({"max_position_embeddings": 4096, "hidden_dropout": 0.1}, "--load x")
    assert (freed.max_position_embeddings, freed.hidden_dropout) == (4096, 0.1)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "gemma2": {"swiglu": False, "geglu": True, "post_norm": True, "add_rmsnorm_offset": True},
    "internlm": {"add_qkv_bias": True, "add_dense_bias": True},
    "mixtral": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40,
                  "moe_shared_expert_gate": True, "add_qkv_bias": True},
    "bloom": {"normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "alibi", "add_qkv_bias": True,
              "embed_layernorm": True, "add_dense_bias": True, "add_mlp_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_the_parameter_count_is_that_of_the_tensor_table(family: str, tied: bool) -> None:
    import math

    from modellink_lora.models.families import check_tensors, family_of
    from modellink_lora.models.shapes import full_shape

    settings = {**NEEDED, **SHAPES[family], "hf_model_type": family}
    config = ModelConfig(**settings, untie_embeddings_and_output_weights=not tied)
    check_tensors(config)
    names = [spec.name for spec in family_of(family).tensors(config)]
    assert config.parameter_count() == sum(math.prod(full_shape(name, config)) for name in names)


def test_a_window_and_scaling_with_the_length_limit_the_length() -> None:
    assert ModelConfig(**NEEDED).exact_length == 0
    assert ModelConfig(**NEEDED, sliding_window=64).exact_length == 64
    dynamic = {"rope_scaling_type": "dynamic", "original_max_position_embeddings": 32}
    assert ModelConfig(**NEEDED, **dynamic).exact_length == 32
    assert ModelConfig(**NEEDED, **dynamic, sliding_window=16).exact_length == 16


def test_what_sets_a_model_apart_from_llama_is_listed() -> None:
    assert ModelConfig(**NEEDED, add_qkv_bias=True).beyond_llama() == []
    config = ModelConfig(**{**NEEDED, "swiglu": False, "geglu": True}, scale_emb=12.0)
    assert config.beyond_llama() == ["swiglu False", "scale_emb 12.0"]
