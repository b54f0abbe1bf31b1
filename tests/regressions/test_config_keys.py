"""config.json is read as transformers reads it: both rope dictionaries, every key by its type, no key unknown.

A rope_scaling that changes nothing was seen in public as MakazhanAlpamys/Soup #793; other inputs were found by fuzzing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import HARMLESS, TYPES
from modellink_lora.models.families import FAMILIES, family_of
from modellink_lora.models.rope import inverse_frequencies
from tests.helpers.made_model import Dimensions, made_model

BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 99,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
DEFAULT = {"rope_theta": 10000.0, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def read(**keys: Any) -> ModelConfig:
    config = {**BASE, **keys}
    return family_of(config["model_type"]).read_config(config)


ROPE: dict[str, dict[str, Any]] = {
    "rope_parameters": {"rope_parameters": {**DEFAULT, "rope_theta": 5e5}},
    "rope_scaling beside the default that transformers 5 saves": {
        "rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "both types, of which rope_type counts": {"rope_scaling": {"type": "llama3", "rope_type": "linear", "factor": 2.0}},
    "llama3 in rope_scaling beside linear": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": LLAMA3},
    "theta above and within": {"rope_theta": 1e6, "rope_parameters": {**DEFAULT, "rope_theta": 5e5}},
    "theta above": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
    "theta above beside rope_scaling": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "an empty rope_scaling": {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "a length above both": {"original_max_position_embeddings": 32, "rope_scaling": LLAMA3},
    "a factor without effect": {"rope_parameters": {**DEFAULT, "factor": 4.0}},
    "Mixtral's own theta": {"model_type": "mixtral", "rope_scaling": {"type": "linear", "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPE)
def test_rope_is_read_as_transformers_reads_it(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    document = {**BASE, **ROPE[name]}
    config = AutoConfig.for_model(**json.loads(json.dumps(document)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.model.rotary_emb)(config)
    ours = family_of(document["model_type"]).read_config(document)
    assert torch.allclose(inverse_frequencies(ours), rotary.inv_freq, rtol=1e-6)


@pytest.mark.parametrize("rope, words", [
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type 'yarn'"),
    ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type 'yarn'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope'"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor: expected float, got str"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": None, "factor": 2.0}}, "rope_scaling.type: expected str"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4 must be below high_freq_factor 4"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.5}}, "original_max_position_embeddings"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "original_max_position_embeddings"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 3}}, "rope_scaling.twist 3 is not known"),
    ({"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters.full_attention"),
    ({"rope_parameters": {**DEFAULT, "rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "rope_parameters.rope_theta is 500000.0 and rope_scaling beside it makes it 10000.0"),
    ({"rope_theta": None}, "rope_theta: expected float"),
    ({"rope_theta": "1e6"}, "rope_theta: expected float, got str"),
    ({"rope_parameters": [1]}, "rope_parameters: expected object"), ({"rope_scaling": "linear"}, "rope_scaling"),
])  # fmt: skip
def test_rope_that_is_not_computed_here_is_refused(rope: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        read(**rope)
    assert str(error.value).startswith("config.json: ") and words in str(error.value)


@pytest.mark.parametrize("key, value", [
    ("clip_qkv", 8.0), ("logit_scale", 0.5), ("use_qk_norm", True), ("sliding_window", 64), ("layer_types", ["x"]),
    ("num_experts", 4), ("embedding_multiplier", 12.0), ("text_config", {"hidden_size": 4}), ("attn_bias_type", "x"),
    ("residual_multiplier", 0), ("pruned_heads", {"1": [0]}),
])  # fmt: skip
def test_a_key_nobody_knows_is_refused_with_its_value(key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        read(**{key: value})
    assert f"config.json: {key} {value!r} is not known to compute the same here" in str(error.value)


@pytest.mark.parametrize("keys", [
    {"clip_qkv": None}, {"use_qk_norm": False}, {"pruned_heads": {}}, {"something": ""},
    {"pretraining_tp": 4, "_name_or_path": "x", "auto_map": {"AutoConfig": "a.B"}, "unsloth_version": "2025.1"},
    {"_model_name_or_path": "Smollm2 135M", "_attn_implementation": "sdpa"},  # of a GGUF file; notes of programs
    {"is_encoder_decoder": False, "tokenizer_class": "LlamaTokenizer", "task_specific_params": {"a": 1}},
    {"model_type": "mixtral", "num_local_experts": 4, "router_jitter_noise": 0.0},  # the class default
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
])  # fmt: skip
def test_a_key_that_asks_for_nothing_is_taken(keys: dict[str, Any]) -> None:
    read(**keys)


def test_what_transformers_makes_of_a_gguf_file_is_known() -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    names = {"llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2"} & GGUF_CONFIG_MAPPING.keys()
    made = {key for name in (*names, "general") for key in GGUF_CONFIG_MAPPING[name].values() if key}
    harmless = {key for keys in HARMLESS.values() for key in keys}
    assert len(names) > 3 and {key for key in made if not key.startswith("_")} <= TYPES.keys() | harmless


def test_a_value_that_the_class_has_by_itself_is_taken_and_another_is_not() -> None:
    mixtral: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4}
    read(**mixtral, router_jitter_noise=0.0)
    with pytest.raises(UserError, match=r"router_jitter_noise 0\.1 is not known"):
        read(**mixtral, router_jitter_noise=0.1)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} says that the weights are quantized"):
        read(**{key: {"quant_method": "gptq"}})


def test_what_transformers_saves_of_each_class_is_known() -> None:
    """Every key, with the value the class has by itself or another of its type that is read."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in (name for family in FAMILIES for name in family.hf_model_types):
        if model_type in CONFIG_MAPPING:
            document = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
            if model_type == "qwen2":
                document["layer_types"] = None
            family_of(model_type).read_config(document)


def test_every_key_that_a_family_names_has_a_type_and_none_is_harmless_too() -> None:
    for family in FAMILIES:
        assert set(family.keys) <= TYPES.keys(), family.name
    harmless = [key for keys in HARMLESS.values() for key in keys]
    assert len(harmless) == len(set(harmless)) and not set(harmless) & {"vocab_size", "rope_theta", "head_dim"}


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [
    "64", 64.0, True, None, [64], {}, -1, 0, 10**12, 10**30, float("nan"), float("inf"), "",
], ids=repr)  # fmt: skip
def test_a_size_of_another_type_is_one_line(key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        read(**{key: value})
    assert key in str(error.value) and str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("keys, words", [
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected bool, got str"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected float, got str"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"head_dim": 0}, "head_dim"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"), ({"num_key_value_heads": 3}, "3 query groups"),
    ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
    ({"attention_dropout": "0"}, "attention_dropout: expected float"), ({"dtype": 16}, "dtype: expected str"),
    ({"hidden_act": ["silu"]}, "hidden_act: expected str"), ({"attention_bias": 1}, "attention_bias: expected bool"),
    ({"initializer_range": "x"}, "initializer_range"), ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"model_type": "mixtral", "num_local_experts": 4, "num_experts": 8}, "num_experts 8 are names of the same"),
])  # fmt: skip
def test_a_value_of_another_type_is_one_line(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        read(**keys)
    assert words in str(error.value) and str(error.value).startswith("config.json: ")


@pytest.mark.parametrize("text, words", [
    ("", "not valid JSON"), ("[]", "expected object, got list"), ("{", "not valid JSON"), ("null", "expected object"),
    ('{"model_type": 5}', "model_type: expected str, got int"), ('{"architectures": [[1]]}', r"architectures\[0\]"),
    ("[" * 100_000, "nested too deeply"), ('{"model_type": "llama"}', "num_attention_heads is None"),
    ('{"model_type": "llama", "hidden_size": 1' + "0" * 5000 + "}", "not valid JSON"),
])  # fmt: skip
def test_a_config_json_that_is_something_else_is_one_line_with_its_path(text: str, words: str, tmp_path: Path) -> None:
    made_model(tmp_path, Dimensions())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        HfModel(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key, value", [
    ("hidden_size", 2**30), ("intermediate_size", 2**30), ("num_hidden_layers", 10_000), ("vocab_size", 2**31 - 1),
    ("head_dim", 2**30), ("num_attention_heads", 2**30),
])  # fmt: skip
def test_huge_sizes_are_refused_by_the_shapes_before_memory_is_asked_for(key: str, value: int, tmp_path: Path) -> None:
    made_model(tmp_path, Dimensions())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError):
        HfModel(tmp_path)
