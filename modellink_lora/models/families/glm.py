"""ChatGLM2, ChatGLM3 and GLM-4 under their first names, and GLM, GLM-4 and GLM-4-0414 under transformers' names.

Half of each head is rotated, in pairs of neighbours; q, k and v have biases.
"""

from __future__ import annotations

from typing import Any

from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import LLAMA_KEYS
from modellink_lora.models.families.common import ends, llama_rows, only, read_llama_like, required, rows
from modellink_lora.models.family import Family
from modellink_lora.models.layouts import StackedGateUp, StackedQKV


def _read_chatglm(config: dict[str, Any]) -> ModelConfig:
    for key, value in (("rmsnorm", True), ("post_layer_norm", True), ("add_bias_linear", False), ("pre_seq_len", None),
                       ("apply_residual_connection_post_layernorm", False), ("fp32_residual_connection", False),
                       ("hidden_dropout", 0.0)):  # fmt: skip
        only(config, key, value)
    heads = required(config, "num_attention_heads")
    grouped = config.get("multi_query_attention", False)
    return ModelConfig(
        num_layers=required(config, "num_layers"),
        hidden_size=required(config, "hidden_size"),
        num_attention_heads=heads,
        ffn_hidden_size=required(config, "ffn_hidden_size"),
        num_query_groups=required(config, "multi_query_group_num") if grouped else heads,
        kv_channels=required(config, "kv_channels"),
        max_position_embeddings=required(config, "seq_length"),
        vocab_size=required(config, "padded_vocab_size"),
        normalization="RMSNorm",
        norm_epsilon=float(config.get("layernorm_epsilon", 1e-5)),
        swiglu=True,
        position_embedding_type="rope",
        rotary_base=10000.0 * float(config.get("rope_ratio") or 1.0),
        rotary_percent=0.5,
        rotary_interleaved=True,
        add_qkv_bias=bool(config.get("add_qkv_bias", False)),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
        **ends(config),
    )


def _read_glm(config: dict[str, Any], **fields: Any) -> ModelConfig:
    bias = bool(config.get("attention_bias", True))  # of q, k and v only
    known = {key: value for key, value in config.items() if key != "attention_bias"}
    absent = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
    return read_llama_like(
        known, absent=absent, rotary_percent=0.5, rotary_interleaved=True, add_qkv_bias=bias, **fields
    )  # fmt: skip


def _read_glm4(config: dict[str, Any]) -> ModelConfig:
    return _read_glm(config, post_norm=True)


CHATGLM = Family(
    name="chatglm3",
    hf_model_types=("chatglm",),
    rows=rows(
        embedding="transformer.embedding.word_embeddings",
        layer="transformer.encoder.layers.*.",
        norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        modules={
            "input_norm": "input_layernorm",
            "qkv": "self_attention.query_key_value",
            "proj": "self_attention.dense",
            "pre_mlp_norm": "post_attention_layernorm",
            "fc1": "mlp.dense_h_to_4h",
            "fc2": "mlp.dense_4h_to_h",
        },
        layouts={"qkv": StackedQKV, "fc1": StackedGateUp},
        biased=("qkv",),
    ),
    read=_read_chatglm,
    keys=(
        "rmsnorm",
        "post_layer_norm",
        "add_bias_linear",
        "pre_seq_len",
        "apply_residual_connection_post_layernorm",
        "fp32_residual_connection",
        "hidden_dropout",
        "num_attention_heads",
        "multi_query_attention",
        "num_layers",
        "num_hidden_layers",
        "hidden_size",
        "ffn_hidden_size",
        "multi_query_group_num",
        "kv_channels",
        "seq_length",
        "vocab_size",
        "padded_vocab_size",
        "layernorm_epsilon",
        "rope_ratio",
        "add_qkv_bias",
        "attention_dropout",
    ),
    aliases=("chatglm2", "glm4"),
)
_GLM: dict[str, Any] = {"layouts": {"fc1": StackedGateUp}, "biased": ("qkv",)}
GLM = Family(
    name="glm",
    hf_model_types=("glm",),
    rows=llama_rows({"fc1": "mlp.gate_up_proj"}, **_GLM),
    read=_read_glm,
    keys=LLAMA_KEYS,
    aliases=("chatglm3", "glm4"),
)
GLM4 = Family(
    name="glm4-0414",
    hf_model_types=("glm4",),
    rows=llama_rows({
        "fc1": "mlp.gate_up_proj",
        "post_attn_norm": "post_self_attn_layernorm",
        "post_mlp_norm": "post_mlp_layernorm",
    }, **_GLM),
    read=_read_glm4,
    keys=LLAMA_KEYS,
)  # fmt: skip
