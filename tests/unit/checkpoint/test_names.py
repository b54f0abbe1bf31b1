"""The two spellings of tensor names are a bijection."""

from __future__ import annotations

import pytest

from modellink_lora.checkpoint.names import TARGETS, from_legacy, from_module, mcore_target, to_legacy

NAMES = [
    "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight",
    *(f"decoder.layers.11.{rest}" for rest in (
        "input_layernorm.weight", "pre_mlp_layernorm.weight", "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias", "self_attention.linear_proj.weight", "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
    )),
]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_from_legacy_undoes_to_legacy(name: str, tied: bool) -> None:
    assert from_legacy(to_legacy(name, tied=tied)) == name


def test_no_two_names_become_one() -> None:
    assert len({to_legacy(name, tied=False) for name in NAMES}) == len(NAMES)


def test_published_legacy_names() -> None:
    assert to_legacy("decoder.layers.3.mlp.linear_fc1.weight", tied=False) == (
        "language_model", "encoder", "layers.3.mlp.dense_h_to_4h.weight",
    )  # fmt: skip
    assert to_legacy("output_layer.weight", tied=True) == ("word_embeddings_for_head", "weight")
    assert {mcore_target(legacy) for legacy in TARGETS.values()} == set(TARGETS)


@pytest.mark.parametrize("path", [("language_model", "encoder", "layers.0.mlp.gate.weight"), ("lm_head",), ("x", "y")])
def test_unknown_names_are_an_error(path: tuple[str, ...]) -> None:
    with pytest.raises(KeyError):
        from_legacy(path)


def test_a_shared_experts_gate_goes_by_its_name_in_files() -> None:
    name = "decoder.layers.3.mlp.shared_expert_gate.weight"
    assert from_module("decoder.layers.3.mlp.shared_experts.gate_weight") == from_module(name) == name


def test_a_norm_inside_a_linear_has_the_name_of_one_before_it() -> None:
    qkv, fc1 = "decoder.layers.3.self_attention.linear_qkv", "decoder.layers.3.mlp.linear_fc1"
    assert from_module(f"{qkv}.layer_norm_weight") == "decoder.layers.3.input_layernorm.weight"
    assert from_module(f"{fc1}.layer_norm_bias") == "decoder.layers.3.pre_mlp_layernorm.bias"
    assert from_module(f"{qkv}.weight") == f"{qkv}.weight"
