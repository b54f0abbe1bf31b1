"""config.json of published models, key by key as they are on the hub: each is read, and makes a model of its size."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.models.families import check_tensors, family_of, with_model_type

_LLAMA = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
          "torch_dtype": "bfloat16", "tie_word_embeddings": False}  # fmt: skip
_GEMMA = {"attention_bias": False, "attention_dropout": 0.0, "head_dim": 256, "initializer_range": 0.02,
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 256000,
          "torch_dtype": "bfloat16", "use_cache": True}  # fmt: skip
_GEMMA2 = {**_GEMMA, "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh",
           "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
           "cache_implementation": "hybrid", "sliding_window": 4096}  # fmt: skip
_GLM = {"model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "attention_dropout": 0.0,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
        "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
        "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32, "original_rope": True,
        "post_layer_norm": True, "rmsnorm": True, "use_cache": True, "tie_word_embeddings": False}  # fmt: skip
_INTERNLM2 = {**_LLAMA, "model_type": "internlm2", "bias": False, "max_position_embeddings": 32768,
              "rms_norm_eps": 1e-5, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000,
              "vocab_size": 92544, "num_key_value_heads": 8, "pretraining_tp": 1}  # fmt: skip
_BAICHUAN = {**_LLAMA, "model_type": "baichuan", "model_max_length": 4096, "rms_norm_eps": 1e-6,
             "torch_dtype": "float16"}  # fmt: skip
_QWEN = {"model_type": "qwen", "bf16": False, "fp16": False, "fp32": False, "initializer_range": 0.02,
         "kv_channels": 128, "layer_norm_epsilon": 1e-6, "no_bias": True, "onnx_safe": None, "rotary_emb_base": 10000,
         "rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False, "use_dynamic_ntk": True,
         "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936}  # fmt: skip

# fmt: off
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {  # its config.json, its parameters, what is read
    "gemma-2b": (
        {**_GEMMA, "model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384,
         "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rope_scaling": None},
        2_506_172_416, {"kv_channels": 256, "geglu": True, "gelu_tanh": True, "num_query_groups": 1,
                        "untie_embeddings_and_output_weights": False}),
    "gemma-2-2b": (
        {**_GEMMA2, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_hidden_layers": 26,
         "num_key_value_heads": 4, "query_pre_attn_scalar": 256},
        2_614_341_888, {"post_norm": True, "exact_length": 4096, "attn_logit_softcapping": 50.0}),
    "gemma-2-9b": (
        {**_GEMMA2, "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
         "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 256},
        9_241_705_984, {"query_pre_attn_scalar": 256.0, "final_logit_softcapping": 30.0}),
    "CodeLlama-7b": (
        {**_LLAMA, "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "max_position_embeddings": 16384, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
         "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 1000000, "vocab_size": 32016},
        6_738_546_688, {"rotary_base": 1e6, "rope_scaling_type": None}),
    "Mistral-7B-v0.1": (
        {**_LLAMA, "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "max_position_embeddings": 32768, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        7_241_732_096, {"num_query_groups": 8, "exact_length": 4096}),
    "Qwen1.5-0.5B": (
        {**_LLAMA, "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
         "max_position_embeddings": 32768, "max_window_layers": 21, "num_hidden_layers": 24, "num_key_value_heads": 16,
         "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False,
         "tie_word_embeddings": True, "vocab_size": 151936},
        463_987_712, {"add_qkv_bias": True, "exact_length": 0, "untie_embeddings_and_output_weights": False}),
    "Qwen2-7B": (
        {**_LLAMA, "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
         "max_position_embeddings": 32768, "max_window_layers": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
         "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 131072, "use_sliding_window": False,
         "vocab_size": 152064},
        7_615_616_512, {"num_query_groups": 4}),
    "Qwen3-8B": (
        {**_LLAMA, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
         "max_position_embeddings": 40960, "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128,
         "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936, "attention_bias": False},
        8_190_735_360, {"qk_layernorm": True, "kv_channels": 128}),
    "glm-4-9b-chat": (
        {**_GLM, "layernorm_epsilon": 1.5625e-07, "num_hidden_layers": 40, "num_layers": 40, "rope_ratio": 500,
         "padded_vocab_size": 151552, "seq_length": 131072, "torch_dtype": "bfloat16"},
        9_399_951_360, {"rotary_base": 5e6, "rotary_percent": 0.5, "norm_epsilon": 1.5625e-07}),
    "chatglm3-6b": (
        {**_GLM, "layernorm_epsilon": 1e-05, "num_layers": 28, "padded_vocab_size": 65024, "seq_length": 8192,
         "vocab_size": 65024, "torch_dtype": "float16", "pre_seq_len": None, "quantization_bit": 0},
        6_243_584_000, {"rotary_base": 1e4, "vocab_size": 65024, "num_query_groups": 2}),
    "internlm2-chat-1_8b": (
        {**_INTERNLM2, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
         "num_hidden_layers": 24},
        1_889_110_016, {"rotary_base": 1e6, "exact_length": 32768, "add_qkv_bias": False}),
    "internlm2-7b": (
        {**_INTERNLM2, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_hidden_layers": 32},
        7_737_708_544, {}),
    "internlm-20b": (
        {**_LLAMA, "model_type": "internlm", "bias": False, "hidden_size": 5120, "intermediate_size": 13824,
         "max_position_embeddings": 4096, "num_attention_heads": 40, "num_hidden_layers": 60,
         "num_key_value_heads": 40, "rms_norm_eps": 1e-6, "vocab_size": 103168,
         "rotary": {"base": 10000, "type": "dynamic"}},
        20_088_714_240, {"add_qkv_bias": False, "exact_length": 4096, "rotary_base": 1e4}),
    "Baichuan2-7B": (
        {**_BAICHUAN, "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
         "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 125696, "z_loss_weight": 0},
        7_505_973_248, {"position_embedding_type": "rope", "normalize_head": True}),
    "Baichuan-13B": (
        {**_BAICHUAN, "hidden_size": 5120, "intermediate_size": 13696, "num_attention_heads": 40,
         "num_hidden_layers": 40, "vocab_size": 64000},
        13_264_901_120, {"position_embedding_type": "alibi", "normalize_head": False}),
    "Qwen-7B": (
        {**_QWEN, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "hidden_size": 4096, "intermediate_size": 22016,
         "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "seq_length": 8192},
        7_721_324_544, {"ffn_hidden_size": 11008, "exact_length": 8192, "add_qkv_bias": True}),
    "Qwen-7B as first published": (
        {**_QWEN, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1, "bias_dropout_fusion": True,
         "ffn_hidden_size": 22016, "n_embd": 4096, "n_head": 32, "n_layer": 32, "n_positions": 8192,
         "padded_vocab_size": 151936, "params_dtype": "torch.bfloat16", "pos_emb": "rotary", "seq_length": 2048},
        7_721_324_544, {"ffn_hidden_size": 11008, "exact_length": 2048, "max_position_embeddings": 8192}),
    "bloomz-560m": (
        {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "seq_length": 2048,
         "vocab_size": 250880, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
         "hidden_dropout": 0.0, "n_inner": None, "offset_alibi": 100, "layer_norm_epsilon": 1e-5},
        559_214_592, {"position_embedding_type": "alibi", "add_mlp_bias": True, "ffn_hidden_size": 4096}),
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read_as_what_it_is(name: str) -> None:
    document, parameters, expected = PUBLISHED[name]
    config = family_of(document["model_type"]).read_config(document)
    check_tensors(config)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.parameter_count() == parameters


def test_a_config_json_without_model_type_is_known_by_its_class() -> None:
    """MiniCPM4's leave it out."""
    document = {"architectures": ["MiniCPMForCausalLM"], "hidden_size": 1024}
    assert with_model_type(document) == {**document, "model_type": "minicpm"}
    assert with_model_type({**document, "model_type": "llama"})["model_type"] == "llama"
    assert with_model_type({"architectures": ["SomethingElse"]}) == {"architectures": ["SomethingElse"]}
