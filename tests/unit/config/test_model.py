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
        ({"normalization": "LayerNorm"}, "normalization LayerNorm is not supported"),
        ({"swiglu": False}, "swiglu False is not supported"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type alibi is not supported"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5: only fully rotated heads"),
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


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_is_that_of_the_tensor_table(tied: bool) -> None:
    import math

    from modellink_lora.models.families import family_of
    from modellink_lora.models.shapes import full_shape

    for family, extra in (("llama", {}), ("qwen2", {"add_qkv_bias": True}), ("qwen3", {"qk_layernorm": True})):
        config = ModelConfig(**NEEDED, hf_model_type=family, untie_embeddings_and_output_weights=not tied, **extra)
        names = [spec.name for spec in family_of(family).tensors(config)]
        assert config.parameter_count() == sum(math.prod(full_shape(name, config)) for name in names), family
