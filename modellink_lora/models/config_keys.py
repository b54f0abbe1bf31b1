"""The keys of config.json: the type of each that is read here, those that change nothing, and what becomes of the rest.

A key that is in neither table is refused, because nobody could say whether the model would compute the same, unless
its value asks for nothing: null, false, empty, or what transformers' class has without it. Keys that begin with an
underscore are notes of the program that wrote the file, as in transformers' own classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from modellink_lora.config.document import typed
from modellink_lora.config.errors import UserError

_Size = Annotated[int, Meta(ge=1, lt=1 << 31)]
_Few = Annotated[int, Meta(ge=1, le=10_000)]  # layers and experts, of each of which there are tensors
_Number = Annotated[float, Meta(ge=0, le=1e30)]
_Positive = Annotated[float, Meta(gt=0, le=1e30)]

ROPE: dict[str, Any] = {  # keys of rope_scaling and rope_parameters
    "rope_type": str, "type": str, "rope_theta": _Positive, "factor": _Positive, "low_freq_factor": _Positive,
    "high_freq_factor": _Positive, "original_max_position_embeddings": _Size, "partial_rotary_factor": _Positive,
}  # fmt: skip
_Rope = TypedDict("_Rope", ROPE, total=False)  # type: ignore[misc]


class _Rotary(TypedDict, total=False):
    base: _Positive
    type: str
    scaling_factor: _Positive


# What a family may read -> its type. JSON's null stands for absent only where the type says so.
TYPES: dict[str, Any] = {
    **dict.fromkeys((
        "hidden_size", "n_embd", "n_embed", "num_attention_heads", "n_head", "intermediate_size", "ffn_hidden_size",
        "vocab_size", "padded_vocab_size", "kv_channels", "multi_query_group_num", "moe_intermediate_size",
        "shared_expert_intermediate_size", "num_experts_per_tok", "seq_length", "n_positions",
    ), _Size),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "num_local_experts"), _Few),
    **dict.fromkeys((
        "num_key_value_heads", "head_dim", "max_position_embeddings", "model_max_length",
        "original_max_position_embeddings", "n_inner",
    ), _Size | None),
    "sliding_window": Annotated[int, Meta(ge=0, lt=1 << 31)] | None,  # 0 for none as well, which transformers writes
    **dict.fromkeys(("max_window_layers", "num_experts"), Annotated[int, Meta(ge=0, le=10_000)]),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), _Positive),
    **dict.fromkeys(("rope_ratio", "partial_rotary_factor"), _Positive | None),
    **dict.fromkeys((
        "rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "initializer_range", "query_pre_attn_scalar",
        "scale_emb", "scale_depth", "rotary_pct", "emb_dropout_prob", "embd_pdrop", "attn_dropout_prob", "attn_pdrop",
        "z_loss_weight",
    ), _Number),
    "dim_model_base": _Size,
    **dict.fromkeys((
        "attention_dropout", "hidden_dropout", "attn_logit_softcapping", "final_logit_softcapping",
    ), _Number | None),
    **dict.fromkeys((
        "tie_word_embeddings", "add_qkv_bias", "bias", "qkv_bias", "norm_topk_prob", "use_sliding_window",
        "use_dynamic_ntk", "use_logn_attn", "norm_head", "multi_query_attention",
    ), bool),
    **dict.fromkeys((
        "attention_bias", "mlp_bias", "rmsnorm", "post_layer_norm", "add_bias_linear", "no_bias", "scale_attn_weights",
        "apply_residual_connection_post_layernorm", "fp32_residual_connection", "use_bidirectional_attention",
    ), bool | None),
    **dict.fromkeys(("dtype", "torch_dtype", "hidden_act", "hidden_activation"), str | None),
    "model_type": str,
    "architectures": list[str] | None,
    "layer_types": list[str] | None,
    "mlp_only_layers": list[int] | None,
    "decoder_sparse_step": int,
    "pre_seq_len": int | None,
    "rope_scaling": _Rope | None,
    "rope_parameters": _Rope | None,
    "rotary": _Rotary | None,
}  # fmt: skip

# What every family reads, and what those read that are Llama-shaped.
_ALWAYS = ("model_type", "architectures", "dtype", "torch_dtype", "initializer_range", "tie_word_embeddings")
LLAMA_KEYS = (
    "hidden_act", "attention_bias", "mlp_bias", "num_attention_heads", "hidden_size", "num_hidden_layers",
    "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size", "rms_norm_eps",
    "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip

# Why a key changes nothing that is computed here -> such keys.
HARMLESS: dict[str, tuple[str, ...]] = {
    "names and versions": (
        "name_or_path", "transformers_version", "transformers.js_config", "auto_map",
        "custom_pipelines", "tokenizer_class", "processor_class", "unsloth_version", "unsloth_fixed", "license",
        "model_name", "chat_format",
    ),
    "ids of special tokens, which the tokenizer has as well": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
        "mask_token_id", "decoder_start_token_id", "bos_token", "eos_token", "pad_token", "unk_token",
        "im_start_id", "im_end_id", "user_token_id", "assistant_token_id",
    ),
    "how attention and caches are implemented": (
        "use_cache", "cache_implementation", "keys_to_ignore_at_inference", "attn_implementation", "use_flash_attn",
        "use_flash_attention", "flash_attention", "use_cache_quantization", "use_cache_kernel", "masked_softmax_fusion",
        "bias_dropout_fusion", "use_memory_efficient_attention",
    ),
    "the precision of single operations": (
        "softmax_in_fp32", "attention_softmax_in_fp32", "apply_query_key_layer_scaling", "bf16", "fp16", "fp32",
        "params_dtype", "onnx_safe", "use_bfloat16", "pretraining_tp", "slow_but_exact", "skip_bias_add",
        "skip_bias_add_qkv",
    ),
    "losses and dropout of training, of which those that act are flags here": (
        "router_aux_loss_coef", "output_router_logits", "z_loss_weight", "resid_pdrop", "classifier_dropout",
        "gradient_checkpointing", "loss_type", "use_reentrant", "neftune_noise_alpha",
    ),
    "what is returned, and to classifiers only": (
        "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
        "torchscript", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type",
        "finetuning_task", "task_specific_params",
    ),
    "lengths that the tokenizer obeys": (
        "max_sequence_length", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side",
        "padding_side", "tokenizer_type",
    ),
    "settings of generation, which flags give": (
        "max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences",
        "remove_invalid_values", "exponential_decay_length_penalty", "bad_words_ids", "suppress_tokens",
        "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "epsilon_cutoff", "eta_cutoff",
    ),
}  # fmt: skip
_HARMLESS = {key for keys in HARMLESS.values() for key in keys}
# Keys that no family reads, and the one value of each that changes nothing.
_ONE_VALUE: dict[str, Any] = {
    "quantization_bit": 0, "pos_emb": "rotary", "original_rope": True, "is_decoder": True, "offset_alibi": 100,
}  # fmt: skip
_QUANTIZED = ("quantization_config", "compression_config", "quantization")


def check_keys(config: Mapping[str, Any], read: tuple[str, ...], *, where: str) -> None:
    """Compare a config.json with the tables.

    Args:
        read: keys that the family reads besides those that all do.
    Raises:
        UserError: a key of another type than declared, or one that nobody knows and that asks for something.
    """
    known = {key: TYPES[key] for key in (*_ALWAYS, *read)}
    typed(dict(config), TypedDict("config", known, total=False), where=where)  # type: ignore[operator]
    for key in _QUANTIZED:
        if config.get(key):
            raise UserError(f"{where}: {key} says that the weights are quantized: give the model as it was before")
    for key, value in config.items():
        if key in known or key in _HARMLESS or key.startswith("_") or value is None or value is False:
            continue
        if value in ("", [], {}) or (key in _ONE_VALUE and value == _ONE_VALUE[key]):
            continue
        if not _is_class_default(str(config.get("model_type")), key, value):
            raise UserError(
                f"{where}: {key} {_short(value)} is not known to compute the same here: remove the key if it changes "
                "nothing of the model"
            )


def _is_class_default(model_type: str, key: str, value: Any) -> bool:
    """Whether transformers' config class of this model type has this value where the key is left out."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return bool(getattr(CONFIG_MAPPING[model_type](), key) == value)
    except (ImportError, KeyError, AttributeError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
