"""config.json to ModelConfig: both generations of spelling, the defaults of absent keys, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import (
    FAMILIES,
    check_name,
    check_tensors,
    family_named,
    family_of,
    guess_model_type,
)

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 259,
    "rms_norm_eps": 1e-5,
}
OWN_KEYS: dict[str, dict[str, Any]] = {  # of families whose config.json is not Llama's
    "qwen": {"kv_channels": 16, "seq_length": 64},
    "chatglm": {"num_layers": 2, "ffn_hidden_size": 128, "kv_channels": 16, "seq_length": 128,
                "padded_vocab_size": 259},
}  # fmt: skip
NOT_THEIRS = {  # keys of BASE that a config.json of these families does not have
    "qwen": ("num_key_value_heads", "rms_norm_eps"),
    "chatglm": ("intermediate_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    "bloom": ("intermediate_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def read(model_type: str = "llama", *, without: tuple[str, ...] = (), **keys: Any) -> ModelConfig:
    settings = {**BASE, **OWN_KEYS.get(model_type, {}), "model_type": model_type, **keys}
    without += NOT_THEIRS.get(model_type, ())
    config = {key: value for key, value in settings.items() if key not in without or key in keys}
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
    tied = {f.name for f in FAMILIES if not read(f.hf_model_types[0]).untie_embeddings_and_output_weights}
    assert tied == {"gemma", "gemma2", "bloom", "minicpm"}, "those whose config classes say so"
    assert not read(tie_word_embeddings=True).untie_embeddings_and_output_weights


def test_sliding_window() -> None:
    assert read("mistral", sliding_window=None).sliding_window == 0
    assert read("mistral", sliding_window=4096).sliding_window == 4096
    assert read("qwen2", sliding_window=4096, use_sliding_window=False).sliding_window == 0


def test_family_switches() -> None:
    assert read("qwen2").add_qkv_bias and not read("qwen2").qk_layernorm
    assert read("qwen3").qk_layernorm and not read("qwen3").add_qkv_bias
    assert not read().add_qkv_bias
    both = read(attention_bias=True, mlp_bias=True)
    assert both.add_qkv_bias and both.add_dense_bias and both.add_mlp_bias
    assert read("internlm").add_dense_bias and not read("internlm", bias=False).add_dense_bias


def test_gemmas_gelu_is_the_tanh_approximation_whatever_the_file_calls_it() -> None:
    for keys in ({"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_activation": None}, {}):
        assert read("gemma", **keys).geglu and read("gemma", **keys).gelu_tanh


def test_gemma2_is_right_up_to_its_window_and_takes_null_for_no_cap() -> None:
    config = read("gemma2", sliding_window=64, attn_logit_softcapping=None, query_pre_attn_scalar=24)
    assert (config.exact_length, config.attn_logit_softcapping, config.final_logit_softcapping) == (64, 0.0, 30.0)
    assert config.query_pre_attn_scalar == 24.0
    assert read("gemma2", sliding_window=64, layer_types=["full_attention"] * 2).exact_length == 0


@pytest.mark.parametrize("keys, positions, unit_head", [
    ({}, "rope", False),
    ({"vocab_size": 125696}, "rope", True),
    ({"max_position_embeddings": None, "model_max_length": 64}, "rope", False),
    ({"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": None}, "alibi", False),
])  # fmt: skip
def test_the_four_baichuan_models_are_told_apart(keys: dict[str, Any], positions: str, unit_head: bool) -> None:
    config = read("baichuan", **keys)
    assert (config.position_embedding_type, config.normalize_head) == (positions, unit_head)


def test_baichuan_without_counted_positions_has_alibi() -> None:
    config = read("baichuan", without=("max_position_embeddings",), model_max_length=64, z_loss_weight=0)
    assert (config.position_embedding_type, config.max_position_embeddings) == ("alibi", 64)
    assert config.normalize_head


def test_scaling_that_acts_behind_a_length_is_taken_with_that_limit() -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    assert read("internlm2", bias=False, rope_scaling=scaling).exact_length == 128
    assert read("qwen").exact_length == 64, "dynamic NTK and logn are QWenConfig's defaults"
    assert read("qwen", use_dynamic_ntk=False, use_logn_attn=False).exact_length == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_has_the_tensors_its_settings_ask_for(family: Any) -> None:
    check_tensors(read(family.hf_model_types[0]))


def test_settings_that_no_family_has_together_are_refused_by_tensor() -> None:
    config = dataclasses.replace(read(), embed_layernorm=True)
    with pytest.raises(UserError, match=r"as llama it would lack embedding.word_embeddings.norm.weight"):
        check_tensors(config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_model_type_guessed_from_settings_has_their_tensors(family: Any) -> None:
    config = read(family.hf_model_types[0])
    check_tensors(dataclasses.replace(config, hf_model_type=guess_model_type(dataclasses.asdict(config))))


@pytest.mark.parametrize("model_type, keys, words", [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("mistral", {"attention_bias": True}, "attention_bias True"),
    ("mistral", {"mlp_bias": True}, "mlp_bias True"),
    ("gemma", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("chatglm", {"rmsnorm": False}, "rmsnorm False"),
    ("chatglm", {"add_bias_linear": True}, "add_bias_linear True"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len 128"),
    ("minicpm", {"num_experts": 8}, "num_experts 8"),
    ("qwen", {"no_bias": False}, "no_bias False"),
    ("qwen", {"rotary_pct": 0.25}, "rotary_pct 0.25"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"torch_dtype": "float8_e4m3fn"}, "float8"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts"),
])  # fmt: skip
def test_what_the_model_does_not_compute_is_refused_by_key(model_type: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"config.json") as error:
        read(model_type, **keys)
    assert words in str(error.value)


def test_an_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'mamba'.*llama, .*mistral, .*bloom"):
        family_of("mamba")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_goes_by_its_names(family: Any) -> None:
    for name in family.spellings:
        check_name(name, family, where="config.json")
    assert family_named(family.name) is family


def test_one_name_may_stand_for_several_families() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "internlm"):
        check_name("llama2", family_of(model_type), where="config.json")
    for model_type in ("chatglm", "glm"):
        check_name("chatglm3", family_of(model_type), where="config.json")


def test_the_names_of_older_launch_scripts_are_known() -> None:
    for name in (
        "baichuan",
        "baichuan2",
        "llama2",
        "chatglm3",
        "gemma",
        "gemma2",
        "bloom",
        "qwen",
        "internlm2",
        "minicpm",
        "mixtral",
        "qwen2-moe",
    ):
        family_named(name)


def test_another_family_name_is_a_contradiction() -> None:
    with pytest.raises(UserError, match=r"--model-type-hf qwen3 contradicts config.json"):
        check_name("qwen3", family_of("llama"), where="config.json")
    with pytest.raises(UserError, match=r"llama2 contradicts config.json"):
        check_name("llama2", family_of("bloom"), where="config.json")
    with pytest.raises(UserError, match=r"mixtral contradicts config.json"):
        check_name("mixtral", family_of("llama"), where="config.json")


@pytest.mark.parametrize("name", ["deepseek2", "deepseek2-lite", "minicpm-moe"])
def test_names_that_scripts_use_for_models_that_are_not_here_are_told_why(name: str) -> None:
    with pytest.raises(UserError, match=rf"--model-type-hf {name} is not supported: it has"):
        family_named(name)


def test_deepseeks_config_is_told_why() -> None:
    with pytest.raises(UserError, match=r"model_type deepseek_v2 is not supported: it has latent attention"):
        family_of("deepseek_v2")


def test_the_router_of_a_mixture_is_read() -> None:
    mixtral = read("mixtral", num_local_experts=4, sliding_window=64)
    assert (mixtral.num_experts, mixtral.moe_router_topk, mixtral.moe_router_pre_softmax) == (4, 2, False)
    assert (mixtral.moe_ffn_hidden_size, mixtral.rotary_base, mixtral.exact_length) == (128, 1e6, 64)
    qwen2 = read("qwen2_moe")
    assert (qwen2.num_experts, qwen2.moe_ffn_hidden_size, qwen2.moe_shared_expert_intermediate_size) == (60, 1408, 5632)
    assert qwen2.add_qkv_bias and qwen2.moe_router_pre_softmax and qwen2.moe_shared_expert_gate
    assert not read("qwen2_moe", norm_topk_prob=True).moe_router_pre_softmax
    assert not read("qwen2_moe", qkv_bias=False).add_qkv_bias
    assert read("qwen3_moe", num_experts=16).num_experts == read("qwen3_moe", num_local_experts=16).num_experts == 16


def test_an_experts_tensor_goes_by_its_number() -> None:
    config, family = read("mixtral"), family_of("mixtral")
    name = "decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight"
    experts = "model.layers.1.block_sparse_moe.experts."
    assert family.tensor(name, config).hf == (f"{experts}7.w1.weight", f"{experts}7.w3.weight")
    with pytest.raises(KeyError):
        family.tensor(name.replace("7", "8"), config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_tensor_and_tensors_agree(family: Any) -> None:
    config = read(family.hf_model_types[0])
    specs = list(family.tensors(config))
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(family.tensor(spec.name, config) == spec for spec in specs)


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # config.json -> parameters that the model card counts
    "Mixtral-8x7B-v0.1": ({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "vocab_size": 32000,
        "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }, 46_702_792_704),
    "Qwen1.5-MoE-A2.7B": ({
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192, "vocab_size": 151936,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "sliding_window": 32768,
        "use_sliding_window": False, "max_window_layers": 21, "tie_word_embeddings": False, "rope_theta": 1e6,
    }, 14_315_784_192),
    "Qwen3-30B-A3B": ({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
        "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
        "attention_bias": False, "sliding_window": None, "tie_word_embeddings": False, "rope_theta": 1e6,
    }, 30_532_122_624),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixtures_have_as_many_parameters_as_their_cards_say(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert family_of(config["model_type"]).read_config(config).parameter_count() == parameters
