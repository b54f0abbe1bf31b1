"""Which linears an adapter covers and how many parameters that makes, from dimensions alone."""

from __future__ import annotations

import pytest

from modellink_lora.adapters.targets import AdaptedLinear, adapted_linears, resolve_targets, trainable_table
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import QKV, GateUp, Replicated, Row

LLAMA_2_7B = ModelConfig(
    num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, max_position_embeddings=4096,
    vocab_size=32000, normalization="RMSNorm", swiglu=True, position_embedding_type="rope",
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
MCORE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LEGACY = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def linears(lora: LoraConfig, config: ModelConfig = LLAMA_2_7B) -> list[AdaptedLinear]:
    return adapted_linears(family_of(config.hf_model_type), config, lora)


@pytest.mark.parametrize("names", [MCORE, LEGACY], ids=["mcore", "legacy"])
@pytest.mark.parametrize(("r", "count"), [(16, 33_685_504), (8, 16_842_752)])
def test_llama_2_7b_has_the_published_number_of_trainable_parameters(
    names: tuple[str, ...], r: int, count: int
) -> None:
    found = linears(LoraConfig(r=r, target_modules=resolve_targets(names)))
    assert sum(linear.parameters for linear in found) == count
    *rows, total = trainable_table(found, LLAMA_2_7B)
    assert [row[0] for row in rows] == list(MCORE)
    assert total[0] == "trainable" and total[-1] == f"{count:,}"
    assert LLAMA_2_7B.parameter_count() == 6_738_415_616


def test_both_spellings_resolve_to_one_order_whatever_the_order_given() -> None:
    assert resolve_targets(LEGACY) == resolve_targets(MCORE[::-1]) == MCORE
    assert resolve_targets(["dense", "linear_proj"]) == ("linear_proj",)


@pytest.mark.parametrize("given", [(), ("q_proj", "linear_qkv")])
def test_no_target_and_an_unknown_one_are_answered_with_all_names(given: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        resolve_targets(given)
    assert all(name in str(error.value) for name in (*MCORE, *LEGACY))
    assert not given or "q_proj matches no layer" in str(error.value)


def test_the_factor_on_the_cut_side_is_cut() -> None:
    found = {x.name.removeprefix("decoder.layers.0."): x for x in linears(LoraConfig(target_modules=MCORE))[:4]}
    shapes = {name: (x.in_features, x.out_features) for name, x in found.items()}
    assert shapes == {
        "self_attention.linear_qkv": (4096, 12288), "self_attention.linear_proj": (4096, 4096),
        "mlp.linear_fc1": (4096, 22016), "mlp.linear_fc2": (11008, 4096),
    }  # fmt: skip
    kinds = {name: (type(x.a_layout), type(x.b_layout)) for name, x in found.items()}
    assert kinds == {
        "self_attention.linear_qkv": (Replicated, QKV), "self_attention.linear_proj": (Row, Replicated),
        "mlp.linear_fc1": (Replicated, GateUp), "mlp.linear_fc2": (Row, Replicated),
    }  # fmt: skip


def test_a_pattern_changes_rank_and_scaling_of_the_linears_it_names_only() -> None:
    lora = LoraConfig(
        r=8, alpha=16.0, target_modules=MCORE, rank_pattern={"linear_fc2": 4, "layers.1.mlp.linear_fc2": 2},
        alpha_pattern={"linear_fc2": 12.0},
    )  # fmt: skip
    found = {x.name: (x.r, x.scaling) for x in linears(lora)}
    assert found.pop("decoder.layers.0.mlp.linear_fc2") == (4, 3.0)
    assert found.pop("decoder.layers.1.mlp.linear_fc2") == (2, 6.0), "the longest key wins"
    assert {v for k, v in found.items() if not k.endswith("linear_fc2")} == {(8, 2.0)}


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_names_no_adapted_linear_is_refused(pattern: str) -> None:
    lora = LoraConfig(target_modules=("linear_qkv",), **{pattern: {"linear_fc1": 4}})
    with pytest.raises(UserError, match="linear_fc1 matches no adapted linear"):
        linears(lora)


def test_grouped_queries_and_wide_heads_change_the_shape_of_qkv() -> None:
    grouped = ModelConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=32, ffn_hidden_size=128,
        max_position_embeddings=128, vocab_size=259, normalization="RMSNorm", swiglu=True,
        position_embedding_type="rope", qk_layernorm=True, hf_model_type="qwen3",
    )  # fmt: skip
    (qkv, proj) = linears(LoraConfig(target_modules=("linear_qkv", "linear_proj")), grouped)
    assert (qkv.in_features, qkv.out_features) == (64, (4 + 2 * 2) * 32)
    assert (proj.in_features, proj.out_features) == (4 * 32, 64)
