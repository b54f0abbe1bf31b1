"""megatron-core and legacy spellings of tensors and LoRA targets: one table, both directions. Pure."""

from __future__ import annotations

TARGETS = {  # mcore module -> legacy module
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}
_TARGETS_FROM_LEGACY = {legacy: mcore for mcore, legacy in TARGETS.items()}

_LAYER = {  # below decoder.layers.i. <-> below layers.i.
    "input_layernorm": "input_norm",
    "pre_mlp_layernorm": "post_attention_norm",
    "post_attn_norm": "post_attn_norm",
    "post_mlp_layernorm": "post_mlp_layernorm",
    **{f"self_attention.{m}": f"self_attention.{TARGETS[m]}" for m in ("linear_qkv", "linear_proj")},
    "self_attention.q_layernorm": "self_attention.q_layernorm",
    "self_attention.k_layernorm": "self_attention.k_layernorm",
    **{f"mlp.{m}": f"mlp.{TARGETS[m]}" for m in ("linear_fc1", "linear_fc2")},
}
_LAYER_FROM_LEGACY = {legacy: mcore for mcore, legacy in _LAYER.items()}

_TOP = {  # legacy: path of nested dictionaries, then the key
    "embedding.word_embeddings.weight": ("language_model", "embedding", "word_embeddings", "weight"),
    "embedding.word_embeddings.norm.weight": ("language_model", "embedding", "word_embeddings", "norm.weight"),
    "embedding.word_embeddings.norm.bias": ("language_model", "embedding", "word_embeddings", "norm.bias"),
    "decoder.final_layernorm.weight": ("language_model", "encoder", "final_norm.weight"),
    "decoder.final_layernorm.bias": ("language_model", "encoder", "final_norm.bias"),
    "output_layer.weight": ("language_model", "output_layer", "weight"),
}
_TIED_HEAD = ("word_embeddings_for_head", "weight")  # the last stage's copy of a tied embedding


# The gate of a shared expert is a parameter of megatron-core's module, and ModelLink's files give it a module's name.
_GATE, _GATE_PARAMETER = ".mlp.shared_expert_gate.weight", ".mlp.shared_experts.gate_weight"


# Transformer Engine's linears behind a norm hold that norm; in files it stands before them, as in the local layers.
_NORM_INSIDE = {
    f".{linear}.layer_norm_{leaf}": f".{norm}.{leaf}"
    for linear, norm in (("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "pre_mlp_layernorm"))
    for leaf in ("weight", "bias")
}


def from_module(name: str) -> str:
    """The name in files, and everywhere here, of a parameter of megatron-core's modules."""
    for inside, before in _NORM_INSIDE.items():
        if name.endswith(inside):
            return name.removesuffix(inside) + before
    return name.replace(_GATE_PARAMETER, _GATE)


def mcore_target(name: str) -> str:
    """The mcore name of a LoRA target given in either spelling; KeyError for anything else."""
    return name if name in TARGETS else _TARGETS_FROM_LEGACY[name]


def to_legacy(name: str, *, tied: bool) -> tuple[str, ...]:
    """Path of nested keys of the mcore tensor `name` below `model` of a legacy rank file."""
    if name == "output_layer.weight" and tied:
        return _TIED_HEAD
    if name in _TOP:
        return _TOP[name]
    index, _, rest = name.removeprefix("decoder.layers.").partition(".")
    module, found = _split_module(rest, _LAYER)
    return ("language_model", "encoder", f"layers.{index}.{found}{rest[len(module) :]}")


def from_legacy(path: tuple[str, ...]) -> str:
    """The inverse of `to_legacy`; KeyError for a key that is in no table."""
    if path == _TIED_HEAD:
        return "output_layer.weight"
    for name, legacy in _TOP.items():
        if legacy == path:
            return name
    if path[:2] != ("language_model", "encoder") or not path[-1].startswith("layers."):
        raise KeyError(".".join(path))
    _, index, rest = path[-1].split(".", 2)
    module, found = _split_module(rest, _LAYER_FROM_LEGACY)
    return f"decoder.layers.{index}.{found}{rest[len(module) :]}"


def _split_module(rest: str, table: dict[str, str]) -> tuple[str, str]:
    for module, other in table.items():
        if rest == module or rest.startswith(module + "."):
            return module, other
    raise KeyError(rest)
