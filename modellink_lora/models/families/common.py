"""What the Llama-shaped families share: tensor table and reading of config.json. A family adds its differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.config_keys import ROPE
from modellink_lora.models.family import TensorRow
from modellink_lora.models.layouts import QKV, GateUp, Layout, Replicated, Row, Vocab

_MEGATRON, _HF = "decoder.layers.*.", "model.layers.*."

# Short names of one layer's tensors, for families that name theirs otherwise than Llama: see `rows`.
_PARTS: dict[str, tuple[str, type[Layout]]] = {
    "qkv": ("self_attention.linear_qkv", QKV),
    "proj": ("self_attention.linear_proj", Row),
    "fc1": ("mlp.linear_fc1", GateUp),
    "fc2": ("mlp.linear_fc2", Row),
    "input_norm": ("input_layernorm", Replicated),
    "pre_mlp_norm": ("pre_mlp_layernorm", Replicated),
    "post_attn_norm": ("post_attn_norm", Replicated),
    "post_mlp_norm": ("post_mlp_layernorm", Replicated),
}
_BIAS_WHEN = {"qkv": "add_qkv_bias", "proj": "add_dense_bias", "fc1": "add_mlp_bias", "fc2": "add_mlp_bias"}


def rows(
    *,
    embedding: str,
    layer: str,
    norm: str,
    head: str,
    modules: Mapping[str, str],
    layouts: Mapping[str, type[Layout]] | None = None,
    biased: Sequence[str] = (),
    norm_bias: bool = False,
    embedding_norm: str | None = None,
) -> tuple[TensorRow, ...]:
    """The rows of a family whose modules have names of their own.

    Args:
        embedding, norm, head: the Hugging Face modules at the ends, `embedding_norm` where there is one.
        layer: prefix of those of one layer, with `*` for its number.
        modules: part of a layer (keys of `_PARTS`) -> the module below `layer`, `{q,k,v}` for several.
        layouts: of parts that are not arranged as Llama's.
        biased: parts that may have a bias; ModelConfig says whether they do.
        norm_bias: whether the norms have one.
    """
    leaves = ("weight", "bias") if norm_bias else ("weight",)
    result = [TensorRow("embedding.word_embeddings.weight", Vocab, f"{embedding}.weight")]
    if embedding_norm:
        result += [TensorRow(f"embedding.word_embeddings.norm.{leaf}", Replicated, f"{embedding_norm}.{leaf}")
                   for leaf in leaves]  # fmt: skip
    for part, module in modules.items():
        ours, layout = _PARTS[part]
        layout = (layouts or {}).get(part, layout)
        own = leaves if part.endswith("norm") else ("weight",)
        result += [TensorRow(f"{_MEGATRON}{ours}.{leaf}", layout, f"{layer}{module}.{leaf}") for leaf in own]
        if part in biased:  # a row linear adds its bias once, behind the sum over ranks
            of_bias = Replicated if layout is Row else layout
            result.append(TensorRow(f"{_MEGATRON}{ours}.bias", of_bias, f"{layer}{module}.bias", when=_BIAS_WHEN[part]))
    result += [TensorRow(f"decoder.final_layernorm.{leaf}", Replicated, f"{norm}.{leaf}") for leaf in leaves]
    result.append(TensorRow("output_layer.weight", Vocab, f"{head}.weight", when="untie_embeddings_and_output_weights"))
    return tuple(result)


LLAMA_MODULES = {
    "input_norm": "input_layernorm",
    "qkv": "self_attn.{q,k,v}_proj",
    "proj": "self_attn.o_proj",
    "pre_mlp_norm": "post_attention_layernorm",
    "fc1": "mlp.{gate,up}_proj",
    "fc2": "mlp.down_proj",
}


def llama_rows(
    modules: Mapping[str, str] | None = None,
    *,
    layouts: Mapping[str, type[Layout]] | None = None,
    biased: Sequence[str] = (),
) -> tuple[TensorRow, ...]:
    """Llama's rows with some parts of a layer replaced or added, and biases where ModelConfig says so."""
    return rows(
        embedding="model.embed_tokens", layer=_HF, norm="model.norm", head="lm_head",
        modules={**LLAMA_MODULES, **(modules or {})}, layouts=layouts, biased=biased,
    )  # fmt: skip


LLAMA_ROWS = llama_rows()
QK_NORM_ROWS = tuple(
    TensorRow(
        _MEGATRON + f"self_attention.{x}_layernorm.weight",
        Replicated,
        _HF + f"self_attn.{x}_norm.weight",
        when="qk_layernorm",
    )
    for x in ("q", "k")
)


def expert_rows(router: str, expert: str, gate_up: str, down: str, shared: str | None = None) -> tuple[TensorRow, ...]:
    """Rows of a mixture of experts in place of the MLP's.

    Args:
        router, expert, shared: modules below a layer, `#` in `expert` for its number.
        gate_up, down: linears of an expert.
    """
    ours = _MEGATRON + "mlp.experts.local_experts.#."
    found = [TensorRow(_MEGATRON + "mlp.router.weight", Replicated, f"{_HF}{router}.weight")]
    found += [
        TensorRow(ours + "linear_fc1.weight", GateUp, f"{_HF}{expert}.{gate_up}.weight"),
        TensorRow(ours + "linear_fc2.weight", Row, f"{_HF}{expert}.{down}.weight"),
    ]
    if shared:
        one, gate = _MEGATRON + "mlp.shared_experts.", _MEGATRON + "mlp.shared_expert_gate.weight"
        found += [
            TensorRow(one + "linear_fc1.weight", GateUp, f"{_HF}{shared}.{gate_up}.weight"),
            TensorRow(one + "linear_fc2.weight", Row, f"{_HF}{shared}.{down}.weight"),
            TensorRow(gate, Replicated, f"{_HF}{shared}_gate.weight", when="moe_shared_expert_gate"),
        ]
    return tuple(found)


def without_mlp(rows: tuple[TensorRow, ...]) -> tuple[TensorRow, ...]:
    """The rows of a family whose MLPs are all mixtures of experts."""
    return tuple(row for row in rows if not row.name.startswith(_MEGATRON + "mlp."))


_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Values that transformers' PretrainedConfig and the four config classes take when config.json leaves the key out.
_ABSENT = {
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def read_llama_like(
    config: Mapping[str, Any],
    *,
    absent: Mapping[str, Any] | None = None,
    activation: tuple[str, ...] = ("silu", "swish"),
    biases: bool = False,
    rotary_percent: float | None = None,
    **fields: Any,
) -> ModelConfig:
    """The ModelConfig of a Llama-shaped config.json.

    Args:
        absent: what this family's config class takes for a key that config.json leaves out.
        activation: values of `hidden_act` that the family may have; more than silu go with fields of their own.
        biases: whether attention_bias (q, k, v and output) and mlp_bias may be true.
        rotary_percent: the rotated part of each head that the family has if config.json does not say.
        fields: further ModelConfig fields that the family sets.
    Raises:
        UserError: a key is missing, or asks for something the model here does not compute.
    """
    known: dict[str, Any] = {**_ABSENT, **(absent or {}), **config}
    get = known.get
    only(config, "hidden_act", *activation)
    for key in ("attention_bias", "mlp_bias"):
        if not biases:
            only(config, key, False)
    heads = required(known, "num_attention_heads")
    hidden = required(known, "hidden_size")
    if not get("head_dim") and hidden % heads:
        raise UserError(f"config.json: num_attention_heads {heads} does not divide hidden_size {hidden}")
    result: dict[str, Any] = {
        "num_layers": required(known, "num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": required(known, "intermediate_size"),
        "num_query_groups": get("num_key_value_heads") or heads,
        "kv_channels": get("head_dim") or hidden // heads,
        "max_position_embeddings": required(known, "max_position_embeddings"),
        "vocab_size": required(known, "vocab_size"),
        "normalization": "RMSNorm",
        "norm_epsilon": float(known["rms_norm_eps"]),
        "swiglu": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not get("tie_word_embeddings"),
        "add_qkv_bias": bool(biases and get("attention_bias")),
        "add_dense_bias": bool(biases and get("attention_bias")),
        "add_mlp_bias": bool(biases and get("mlp_bias")),
        "attention_dropout": float(get("attention_dropout") or 0.0),
        **ends(known),
        **read_rope(config, rotary_percent),
    }
    return ModelConfig(**{**result, **fields})


def ends(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every config.json says in the same way."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UserError(f"config.json: dtype {dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
    return {
        "init_method_std": float(config.get("initializer_range", 0.02)),
        "params_dtype": _DTYPES[dtype],
        "hf_model_type": str(config["model_type"]),
    }


def read_rope(config: Mapping[str, Any], rotary_percent: float | None = None) -> dict[str, Any]:
    """ModelConfig fields of the rotary embedding; `rotary_percent` as in `read_llama_like`.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one dictionary `rope_parameters`. Where a file
    has both, transformers 5 puts `rope_scaling` in the place of `rope_parameters`, whose other values are lost: what
    these would have changed is refused.
    """
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(where) or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or rotary_percent or 1.0
    beside = config.get("rope_parameters") or {}
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", part)):
        if beside.get(key, value) != value:
            raise UserError(
                f"config.json: rope_parameters.{key} is {beside[key]} and rope_scaling beside it makes it {value}: put "
                f"{key} into rope_scaling, and remove rope_parameters"
            )
    if rotary_percent is None:
        only({"partial_rotary_factor": part}, "partial_rotary_factor", 1, 1.0)
    fields: dict[str, Any] = {"rotary_percent": float(part), "rotary_base": float(theta)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "dynamic"):
        raise UserError(
            f"config.json: {where}.rope_type {kind!r} is not supported; supported are default, linear, llama3, dynamic"
        )
    if unknown := sorted(key for key in rope if key not in ROPE and rope[key] is not None):
        raise UserError(
            f"config.json: {where}.{unknown[0]} {rope[unknown[0]]!r} is not known to compute the same here: remove "
            "the key if it changes nothing of the model"
        )
    if kind == "default":
        return fields
    # the length stands above both dictionaries in transformers
    length = {key: config[key] for key in ("original_max_position_embeddings",) if config.get(key) is not None}

    def number(key: str) -> float:
        value = {**rope, **length}.get(key)
        if value is None:
            raise UserError(f"config.json: {where} of type {kind} needs a positive {key}, it has None")
        return float(value)

    fields |= {"rope_scaling_type": kind, "rope_scaling_factor": number("factor")}
    if kind == "dynamic":  # frequencies change with the length, and only behind the positions of the config
        fields["original_max_position_embeddings"] = required(config, "max_position_embeddings")
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise UserError(f"config.json: {where}.low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        fields |= {
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(number("original_max_position_embeddings")),
        }
    return fields


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def refuse_mixed_windows(config: Mapping[str, Any]) -> None:
    """Qwen2 and Qwen3 may attend through a window in some layers only; the model here has one kind of layer."""
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        odd = sorted(set(kinds) - {"full_attention"})
        raise UserError(f"config.json: layer_types contains {', '.join(odd)}; only full_attention is supported")
    first = config.get("max_window_layers", 28)
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    if kinds is None and windowed and first < required(config, "num_hidden_layers"):
        raise UserError(
            f"config.json: use_sliding_window true with max_window_layers {first} gives some layers an attention "
            "window; only full attention is supported for this family"
        )


def named(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """`config` with a setting that has several names under the first of `keys`.

    Raises UserError where two of them say different things.
    """
    said = {key: config[key] for key in keys if config.get(key) is not None}
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key} {value}" for key, value in said.items())
        raise UserError(f"config.json: {both} are names of the same setting: remove the wrong one")
    return {**config, **dict.fromkeys(keys[:1] if said else (), next(iter(said.values()), None))}


def only(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """Raise UserError unless config[key] is absent, null or one of `allowed`."""
    value = config.get(key)
    if value is not None and value not in allowed:
        raise UserError(f"config.json: {key} {value!r} is not supported; this version needs {allowed[0]!r}")


def required(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, expected a whole number of at least 1")
    return value
