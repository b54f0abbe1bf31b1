"""Full shape of every Megatron tensor of a model, from its dimensions. Letters as in layouts.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from modellink_lora.config.model import ModelConfig


def tensor_names(config: ModelConfig) -> Iterator[str]:
    """Global names of all tensors that a model of these settings has, whatever its family."""
    leaves = ("weight", "bias") if config.norm_bias else ("weight",)
    layer = [f"{norm}.{leaf}" for norm in ("input_layernorm", "pre_mlp_layernorm") for leaf in leaves]
    linears = [("self_attention.linear_qkv", config.add_qkv_bias)]
    linears += [("self_attention.linear_proj", config.add_dense_bias)]
    if config.num_experts:
        layer += ["mlp.router.weight"]
        mlps = [f"mlp.experts.local_experts.{expert}" for expert in range(config.num_experts)]
        mlps += ["mlp.shared_experts"] if config.moe_shared_expert_intermediate_size else []
        layer += [f"{mlp}.{linear}.weight" for mlp in mlps for linear in ("linear_fc1", "linear_fc2")]
        layer += ["mlp.shared_expert_gate.weight"] if config.moe_shared_expert_gate else []
    else:
        linears += [("mlp.linear_fc1", config.add_mlp_bias), ("mlp.linear_fc2", config.add_mlp_bias)]
    for module, bias in linears:
        layer += [f"{module}.weight", f"{module}.bias"] if bias else [f"{module}.weight"]  # fmt: skip
    if config.qk_layernorm:
        layer += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    if config.post_norm:
        layer += ["post_attn_norm.weight", "post_mlp_layernorm.weight"]
    yield "embedding.word_embeddings.weight"
    if config.embed_layernorm:
        yield from (f"embedding.word_embeddings.norm.{leaf}" for leaf in leaves)
    for index in range(config.num_layers):
        yield from (f"decoder.layers.{index}.{name}" for name in layer)
    yield from (f"decoder.final_layernorm.{leaf}" for leaf in leaves)
    if config.untie_embeddings_and_output_weights:
        yield "output_layer.weight"


def full_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the tensor of global Megatron name `name` on one process, vocabulary padded; KeyError if unknown."""
    h, f, vocab = config.hidden_size, config.ffn_hidden_size, config.padded_vocab_size
    qkv, columns = config.query_width + 2 * config.kv_width, f * config.fc1_parts
    one, shared = config.moe_ffn_hidden_size, config.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocab, h),
        "self_attention.linear_proj.bias": (h,),
        "mlp.linear_fc1.bias": (columns,),
        "mlp.linear_fc2.bias": (h,),
        "self_attention.linear_qkv.weight": (qkv, h),
        "self_attention.linear_qkv.bias": (qkv,),
        "self_attention.linear_proj.weight": (h, config.query_width),
        "self_attention.q_layernorm.weight": (config.kv_channels,),
        "self_attention.k_layernorm.weight": (config.kv_channels,),
        "mlp.linear_fc1.weight": (columns, h),
        "mlp.linear_fc2.weight": (h, f),
        "mlp.router.weight": (config.num_experts, h),
        "mlp.experts.linear_fc1.weight": (one * config.fc1_parts, h),
        "mlp.experts.linear_fc2.weight": (h, one),
        "mlp.shared_experts.linear_fc1.weight": (shared * config.fc1_parts, h),
        "mlp.shared_experts.linear_fc2.weight": (h, shared),
        "mlp.shared_expert_gate.weight": (1, h),
        "output_layer.weight": (vocab, h),
    }
    norms = ("input_layernorm", "pre_mlp_layernorm", "post_attn_norm", "post_mlp_layernorm",
             "decoder.final_layernorm", "embedding.word_embeddings.norm")  # fmt: skip
    shapes |= {f"{norm}.{leaf}": (h,) for norm in norms for leaf in ("weight", "bias")}
    return shapes[re.sub(r"^decoder\.layers\.\d+\.|local_experts\.\d+\.", "", name)]


def kinds_of(names: Sequence[str]) -> str:
    """How many tensors these are, and their names with `*` for the layer or expert."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(kinds)})"
