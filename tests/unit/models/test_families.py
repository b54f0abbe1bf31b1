"""config.json to ModelConfig: both generations of spelling, the defaults of absent keys, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import FAMILIES, check_name, family_named, family_of

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 259, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def read(model_type: str = "llama", *, without: tuple[str, ...] = (), **keys: Any) -> ModelConfig:
    config = {key: value for key, value in {**BASE, "model_type": model_type, **keys}.items() if key not in without}
    return family_of(model_type).read_config(config)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ],
)
def test_both_spellings_of_rope_give_the_same_model(keys: dict[str, Any]) -> None:
    config = read(**keys)
    assert (config.rotary_base, config.rope_scaling_type, config.rope_scaling_factor) == (5e5, "llama3", 8.0)
    assert (config.low_freq_factor, config.high_freq_factor, config.original_max_position_embeddings) == (1.0, 4.0, 64)


def test_rope_without_scaling() -> None:
    assert read(rope_theta=1e6).rotary_base == read(rope_parameters={"rope_theta": 1e6}).rotary_base == 1e6
    assert read().rotary_base == 10000.0
    assert read(rope_theta=1e6, rope_scaling=None).rope_scaling_type is None


def test_linear_scaling() -> None:
    config = read(rope_scaling={"type": "linear", "factor": 4.0})
    assert (config.rope_scaling_type, config.rope_scaling_factor) == ("linear", 4.0)


@pytest.mark.parametrize("keys, dtype", [
    ({"torch_dtype": "bfloat16"}, "bf16"), ({"dtype": "float16"}, "fp16"), ({}, "fp32"),
])  # fmt: skip
def test_both_spellings_of_dtype(keys: dict[str, Any], dtype: str) -> None:
    assert read(**keys).params_dtype == dtype


def test_head_dim_absent_null_or_given() -> None:
    assert read().kv_channels == read(head_dim=None).kv_channels == 16
    assert read(head_dim=32).kv_channels == 32
    assert read("qwen3").kv_channels == 128, "Qwen3Config's own default"


def test_key_value_heads_absent_means_one_for_each_head() -> None:
    assert read(without=("num_key_value_heads",)).num_query_groups == 4


def test_embeddings_are_separate_unless_config_says_tied() -> None:
    assert all(read(f.hf_model_types[0]).untie_embeddings_and_output_weights for f in FAMILIES)
    assert not read(tie_word_embeddings=True).untie_embeddings_and_output_weights


def test_sliding_window() -> None:
    assert read("mistral", sliding_window=None).sliding_window == 0
    assert read("mistral", sliding_window=4096).sliding_window == 4096
    assert read("qwen2", sliding_window=4096, use_sliding_window=False).sliding_window == 0


def test_family_switches() -> None:
    assert read("qwen2").add_qkv_bias and not read("qwen2").qk_layernorm
    assert read("qwen3").qk_layernorm and not read("qwen3").add_qkv_bias
    assert not read().add_qkv_bias


@pytest.mark.parametrize("model_type, keys, words", [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias True"),
    ("llama", {"mlp_bias": True}, "mlp_bias True"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters.rope_type 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"torch_dtype": "float8_e4m3fn"}, "float8"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
])  # fmt: skip
def test_what_the_model_does_not_compute_is_refused_by_key(model_type: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"config.json") as error:
        read(model_type, **keys)
    assert words in str(error.value)


def test_an_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'bloom'.*llama, mistral, qwen2, qwen3"):
        family_of("bloom")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_llama2_names_every_llama_shaped_family(family: Any) -> None:
    check_name("llama2", family, where="config.json")
    check_name(family.name, family, where="config.json")
    assert family_named(family.name) is family


def test_another_family_name_is_a_contradiction() -> None:
    with pytest.raises(UserError, match=r"--model-type-hf qwen3 contradicts config.json"):
        check_name("qwen3", family_of("llama"), where="config.json")
    with pytest.raises(UserError, match="baichuan2 is not supported"):
        check_name("baichuan2", family_of("llama"), where="config.json")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_tensor_and_tensors_agree(family: Any) -> None:
    config = read(family.hf_model_types[0])
    specs = list(family.tensors(config))
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(family.tensor(spec.name, config) == spec for spec in specs)
