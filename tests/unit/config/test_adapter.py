"""LoRA hyper-parameters: scaling, per-module patterns, ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest

from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError


def test_scaling_is_alpha_over_r_and_rank_stabilised_alpha_over_its_root() -> None:
    assert LoraConfig(r=16, alpha=32.0).scaling_of("linear_qkv") == 2.0
    assert LoraConfig(r=16, alpha=32.0, use_rslora=True).scaling_of("linear_qkv") == 8.0


def test_a_pattern_matches_at_dots_and_the_longest_key_wins() -> None:
    lora = LoraConfig(r=8, alpha=8.0, rank_pattern={"linear_fc1": 4, "3.mlp.linear_fc1": 2}, use_rslora=True)
    assert lora.rank_of("decoder.layers.0.mlp.linear_fc1") == 4
    assert lora.rank_of("decoder.layers.3.mlp.linear_fc1") == 2
    assert lora.rank_of("decoder.layers.13.mlp.linear_fc1") == 4, "13 does not end at the dot before 3"
    assert lora.rank_of("linear_fc2") == 8
    assert lora.scaling_of("decoder.layers.3.mlp.linear_fc1") == 8.0 / math.sqrt(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "--lora-r 0: must be at least 1"),
        ({"r": 2.0}, "--lora-r 2.0: must be a whole number"),
        ({"rank_pattern": {"linear_fc1": -1}}, r"rank_pattern\[linear_fc1\] -1"),
        ({"alpha": 0.0}, "--lora-alpha 0.0: must be above 0"),
        ({"alpha": math.nan}, "--lora-alpha nan"),
        ({"alpha_pattern": {"x": math.inf}}, r"alpha_pattern\[x\] inf"),
        ({"dropout": 1.0}, "--lora-dropout 1.0: must be at least 0 and below 1"),
    ],
)
def test_values_that_make_no_adapter_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig(**values)
