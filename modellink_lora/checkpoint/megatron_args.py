"""The `args` Namespace of a rank file, to and from ModelConfig. Tensors win over args wherever both tell a size."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from modellink_lora.checkpoint.dtypes import DTYPES
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.parallel.partition import Partition

# Set in files of this program: their args hold the whole ModelConfig. Elsewhere rope and norm settings may be mere
# defaults of Megatron's parser, because ModelLink's converter did not read them from config.json.
COMPLETE = "modellink_lora_format"
_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
# Fields that a file of another program may have wrong; a flag replaces them instead of contradicting them.
_UNRELIABLE = {
    "rotary_base", "rope_scaling_type", "rope_scaling_factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "norm_epsilon", "make_vocab_size_divisible_by", "rotary_percent",
    "rotary_interleaved", "position_embedding_type", "geglu", "gelu_tanh", "add_rmsnorm_offset", "input_embeds_norm",
    "scale_emb", "scale_depth", "dim_model_base", "normalize_head", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "moe_router_topk", "moe_router_pre_softmax",
}  # fmt: skip

# Settings that are read before or beside those of ModelConfig.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "tensor_model_parallel_size": int, "pipeline_model_parallel_size": int, "expert_model_parallel_size": int,
    "lora_r": int, "lora_alpha": (int, float), "lora_target_modules": (list, tuple),
}  # fmt: skip


def check_args(args: argparse.Namespace, *, where: str) -> None:
    """Raise UserError where a setting is a tensor, or of another type than Megatron-LM's parser gives it."""
    for name, value in vars(args).items():
        odd = value is not None and not isinstance(value, _TYPES.get(name, object))
        if isinstance(value, torch.Tensor) or odd:
            raise UserError(f"{where}: args.{name} is of type {type(value).__name__}, which Megatron-LM does not write")
    for name in getattr(args, "lora_target_modules", None) or ():
        if not isinstance(name, str):
            raise UserError(f"{where}: args.lora_target_modules holds a {type(name).__name__}, expected names")


def model_config(
    args: argparse.Namespace, sizes: Mapping[str, Any], flags: Mapping[str, Any], *, where: str
) -> ModelConfig:
    """The ModelConfig of a checkpoint.

    Args:
        args: of the rank file.
        sizes: ModelConfig fields measured on the tensors.
        flags: ModelConfig fields the user typed; one that contradicts the checkpoint raises UserError.
    """
    stored = {name: value for name in _FIELDS if (value := getattr(args, name, None)) is not None}
    complete = hasattr(args, COMPLETE)
    if not complete:
        stored = _from_megatron(args, stored, where)
        # experts beside a gated shared one are Qwen2-MoE's, which takes the softmax before it chooses
        stored.setdefault("moe_router_pre_softmax", bool(sizes.get("moe_shared_expert_gate")))
        if isinstance(args.__dict__.get("num_layers"), int) and args.num_layers != sizes["num_layers"]:
            raise UserError(f"{where}: args say {args.num_layers} layers, the files hold {sizes['num_layers']}")
        if "vocab_size" in flags and not isinstance(getattr(args, "vocab_size", None), int):
            sizes = {**sizes, "vocab_size": flags["vocab_size"]}  # without it the padded rows would count as tokens
        stored |= {name: value for name, value in flags.items() if name in _UNRELIABLE and name not in sizes}
    try:
        config = ModelConfig(**_typed({**stored, **sizes}, where))
        family_of(config.hf_model_type)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
    rest = (
        flags
        if complete
        else {name: value for name, value in flags.items() if name in sizes or name not in _UNRELIABLE}
    )
    return config.with_flags(dict(rest), where)


def names_its_model(args: argparse.Namespace) -> bool:
    """Whether the args are of this program and so say all of a ModelConfig."""
    return hasattr(args, COMPLETE)


def leave_open(args: argparse.Namespace) -> None:
    """Take back the claim that `args` say all: what they were made from may hold mere defaults, too."""
    delattr(args, COMPLETE)
    if args.vocab_size == args.padded_vocab_size:
        args.vocab_size = None  # padding may have been counted as tokens


def _from_megatron(args: argparse.Namespace, stored: dict[str, Any], where: str) -> dict[str, Any]:
    """What Megatron's own spelling of `args` says, in ModelConfig fields."""
    if getattr(args, "use_rotary_position_embeddings", False):
        stored["position_embedding_type"] = "rope"
    if getattr(args, "use_rope_scaling", False):
        stored.setdefault("rope_scaling_type", "llama3")
    if "layernorm_epsilon" in args and "norm_epsilon" not in args:
        stored["norm_epsilon"] = args.layernorm_epsilon
    if stored.get("rope_scaling_type") is None:
        for name in ("rope_scaling_factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            stored.pop(name, None)
    elif stored["rope_scaling_type"] not in ("linear", "llama3", "dynamic"):
        raise UserError(
            f"{where}: rope_scaling_type {stored['rope_scaling_type']!r} is not supported (linear, llama3, dynamic)"
        )
    if getattr(args, "use_glm_rope", False):
        stored["rotary_interleaved"] = True
    if stored.get("position_embedding_type") == "alibi":
        stored["rotary_percent"] = 1.0  # a default there, without meaning
    # --geglu is exact there, but the models it is used for, Gemma's, were made with the tanh approximation; a GELU
    # without gate (BLOOM) is one there too
    gated, silu = stored.get("geglu", False), stored.get("swiglu", False)
    stored["gelu_tanh"] = not silu and (not gated or bool(stored.get("add_rmsnorm_offset")))
    stored.pop("params_dtype", None)
    for name in ("attention_dropout", "hidden_dropout"):
        stored.pop(name, None)  # 0.1 there is a default of Megatron's parser; Llama-like models have none
    return stored


def _typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Values in the field's own type; Megatron stores some floats as ints and the other way round."""
    kinds = {field.name: str(field.type).split(" |")[0] for field in dataclasses.fields(ModelConfig)}
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(ModelConfig)}
    result = {}
    for name, value in values.items():
        kind = kinds[name]
        if kind in ("int", "float") and isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = 2**31 if kind == "int" else 1e30
            if not -limit < value < limit or (kind == "int" and value != int(value)):
                raise UserError(f"{where}: args.{name} is {str(value)[:40]}, expected a value of type {kind}")
            value = int(value) if kind == "int" else float(value)
        elif type(value) is not {"int": int, "float": float, "bool": bool, "str": str}[kind]:
            raise UserError(f"{where}: args.{name} is {value!r}, expected a value of type {kind}")
        if choices[name] and value not in choices[name]:
            raise UserError(f"{where}: args.{name} is {value!r}, expected one of {', '.join(choices[name])}")
        result[name] = value
    return result


def namespace(
    config: ModelConfig, *, tp: int, partition: Partition, legacy: bool, dtype: torch.dtype, iteration: int, ep: int = 1
) -> argparse.Namespace:
    """The `args` of a rank file: every ModelConfig field under Megatron's name, and what Megatron reads besides."""
    uneven = len(set(partition.counts)) > 1
    values = dataclasses.asdict(config) | {
        COMPLETE: 1,
        "params_dtype": dtype,
        "bf16": dtype == DTYPES["bf16"],
        "fp16": dtype == DTYPES["fp16"],
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": partition.stages,
        "expert_model_parallel_size": ep,
        "virtual_pipeline_model_parallel_size": partition.chunks if partition.chunks > 1 else None,
        "num_layers_per_virtual_pipeline_stage": partition.counts[0] if partition.chunks > 1 else None,
        "num_layer_list": ",".join(map(str, partition.counts)) if uneven else None,
        "use_mcore_models": not legacy,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "use_rotary_position_embeddings": config.position_embedding_type == "rope",
        "use_glm_rope": config.rotary_interleaved,
        "add_bias_linear": config.add_qkv_bias and config.add_dense_bias and config.add_mlp_bias,
        "seq_length": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "tokenizer_type": "PretrainedFromHF",
        "model_type": None,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    for name in ("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        values[name] = values[name] or None  # how Megatron says that there are none
    return argparse.Namespace(**values)
