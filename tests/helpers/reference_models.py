"""Tiny models of the families that transformers has no class for, written from their published descriptions.

Nothing of the product is used here. Letters: s sequence, h hidden, n query heads, g key/value heads, d head width,
f width of the MLP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

H, N, G, D, FFN, VOCAB, LAYERS = 64, 4, 2, 16, 128, 259, 2
_LLAMA = {"hidden_size": H, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": N,
          "max_position_embeddings": 128, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "hidden_act": "silu",
          "tie_word_embeddings": False, "torch_dtype": "float32"}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Hugging Face names; those of a layer below `layer`."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    norm: str = "model.norm"
    head: str = "lm_head"
    before_attention: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    proj: str = "self_attn.o_proj"
    before_mlp: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


def _three(outputs: list[Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v from linears of their own."""
    q, k, v = outputs
    return q, k, v


def _stacked(outputs: list[Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """All of q, all of k, all of v out of one linear."""
    q, k, v = outputs[0].split([N * D, groups * D, groups * D], dim=-1)
    return q, k, v


def _grouped(outputs: list[Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each key/value head its query heads, its key, its value, out of one linear (InternLM2)."""
    parts = outputs[0].unflatten(-1, (groups, N // groups + 2, D))
    return parts[..., :-2, :].flatten(-3), parts[..., -2, :].flatten(-2), parts[..., -1, :].flatten(-2)


@dataclass(frozen=True)
class Kind:
    """One published model.

    Attributes:
        rotated: channels of a head that are rotated; `neighbours`: in pairs (0, 1), (2, 3), ... instead of halves.
        gate_first: whether the gate comes before the other projection in `gate_up`.
    """

    config: dict[str, Any]
    names: Names = Names()
    split: Callable[[list[Tensor], int], tuple[Tensor, Tensor, Tensor]] = _three
    groups: int = N
    qkv_bias: bool = False
    proj_bias: bool = False
    theta: float = 10000.0
    rotated: int = D
    neighbours: bool = False
    alibi: bool = False
    gate_first: bool = True
    embedding_scale: float = 1.0
    branch_scale: float = 1.0
    head_divisor: float = 1.0
    unit_head: bool = False
    tied: bool = False


_QWEN = Names(
    "transformer.wte", "transformer.h.{}.", "transformer.ln_f", "lm_head", "ln_1", ("attn.c_attn",), "attn.c_proj",
    "ln_2", ("mlp.w1", "mlp.w2"), "mlp.c_proj",
)  # fmt: skip
_CHATGLM = Names(
    "transformer.embedding.word_embeddings", "transformer.encoder.layers.{}.", "transformer.encoder.final_layernorm",
    "transformer.output_layer", "input_layernorm", ("self_attention.query_key_value",), "self_attention.dense",
    "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h",
)  # fmt: skip
_INTERNLM2 = Names(
    "model.tok_embeddings", "model.layers.{}.", "model.norm", "output", "attention_norm", ("attention.wqkv",),
    "attention.wo", "ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2",
)  # fmt: skip
_BAICHUAN = Names(qkv=("self_attn.W_pack",))
_13B = {key: value for key, value in _LLAMA.items() if key != "max_position_embeddings"} | {"model_max_length": 128}

KINDS = {
    "baichuan-7b": Kind({**_LLAMA, "model_type": "baichuan"}, _BAICHUAN, _stacked),
    "baichuan-13b": Kind({**_13B, "model_type": "baichuan"}, _BAICHUAN, _stacked, alibi=True),
    "baichuan2-7b": Kind(
        {**_LLAMA, "model_type": "baichuan", "vocab_size": 125696}, _BAICHUAN, _stacked, unit_head=True
    ),
    "baichuan2-13b": Kind(
        {**_13B, "model_type": "baichuan", "z_loss_weight": 0}, _BAICHUAN, _stacked, alibi=True, unit_head=True
    ),
    "chatglm3": Kind(
        {"model_type": "chatglm", "num_layers": LAYERS, "hidden_size": H, "ffn_hidden_size": FFN, "kv_channels": D,
         "num_attention_heads": N, "multi_query_attention": True, "multi_query_group_num": G, "seq_length": 128,
         "padded_vocab_size": VOCAB, "layernorm_epsilon": 1e-5, "rmsnorm": True, "add_qkv_bias": True,
         "add_bias_linear": False, "post_layer_norm": True, "rope_ratio": 3, "apply_query_key_layer_scaling": True,
         "tie_word_embeddings": False, "torch_dtype": "float32"},
        _CHATGLM, _stacked, groups=G, qkv_bias=True, theta=30000.0, rotated=D // 2, neighbours=True,
    ),
    "internlm": Kind({**_LLAMA, "model_type": "internlm", "bias": True}, qkv_bias=True, proj_bias=True),
    "internlm2": Kind(
        {**_LLAMA, "model_type": "internlm2", "bias": False, "num_key_value_heads": G, "rope_theta": 1000000,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        _INTERNLM2, _grouped, groups=G, theta=1e6,
    ),
    "qwen": Kind(
        {"model_type": "qwen", "hidden_size": H, "intermediate_size": 2 * FFN, "num_hidden_layers": LAYERS,
         "num_attention_heads": N, "kv_channels": D, "seq_length": 64, "max_position_embeddings": 128,
         "vocab_size": VOCAB, "layer_norm_epsilon": 1e-5, "no_bias": True, "rotary_pct": 1.0, "rotary_emb_base": 10000,
         "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False, "torch_dtype": "float32"},
        _QWEN, _stacked, qkv_bias=True, gate_first=False,
    ),
    "minicpm": Kind(
        {**_LLAMA, "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
         "num_key_value_heads": G, "tie_word_embeddings": True},
        groups=G, embedding_scale=12.0, branch_scale=1.4 / math.sqrt(LAYERS), head_divisor=H / 16, tied=True,
    ),
    "index": Kind({**_LLAMA, "model_type": "index", "norm_head": True}, unit_head=True),
}  # fmt: skip


def reference_model(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Save config.json and random weights of KINDS[name]."""
    kind = KINDS[name]
    names, wide = kind.names, (N + 2 * kind.groups) * D
    vocab = kind.config.get("vocab_size") or kind.config["padded_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": (vocab, H), f"{names.norm}.weight": (H,)}
    if not kind.tied:
        shapes[f"{names.head}.weight"] = (vocab, H)
    rows = [N * D, kind.groups * D, kind.groups * D] if len(names.qkv) == 3 else [wide]
    for layer in range(LAYERS):
        at = names.layer.format(layer)
        for module, out in zip(names.qkv, rows, strict=True):
            shapes[f"{at}{module}.weight"] = (out, H)
            if kind.qkv_bias:
                shapes[f"{at}{module}.bias"] = (out,)
        shapes[f"{at}{names.proj}.weight"] = (H, N * D)
        if kind.proj_bias:
            shapes[f"{at}{names.proj}.bias"] = (H,)
        for module in names.gate_up:
            shapes[f"{at}{module}.weight"] = (2 * FFN // len(names.gate_up), H)
        shapes[f"{at}{names.down}.weight"] = (H, FFN)
        for module in (names.before_attention, names.before_mlp):
            shapes[f"{at}{module}.weight"] = (H,)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and key.endswith("weight")
        tensors[key] = 1 + 0.3 * x.clamp(-2, 2) if is_norm else x * (0.1 if len(shape) == 1 else 0.05)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(kind.config))
    return folder


def reference_logits(name: str, folder: Path, ids: list[int]) -> Tensor:
    """Logits [s, vocabulary] in fp32."""
    kind, tensors = KINDS[name], load_file(folder / "model.safetensors")
    names = kind.names

    def linear(module: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{module}.weight"], tensors.get(f"{module}.bias"))

    def norm(module: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * tensors[f"{module}.weight"]

    x = tensors[f"{names.embedding}.weight"][torch.tensor(ids)] * kind.embedding_scale  # [s, h]
    for layer in range(LAYERS):
        at = names.layer.format(layer)
        y = norm(at + names.before_attention, x)
        q, k, v = kind.split([linear(at + module, y) for module in names.qkv], kind.groups)
        x = x + kind.branch_scale * linear(at + names.proj, _attention(kind, q, k, v))
        y = norm(at + names.before_mlp, x)
        first, second = torch.cat([linear(at + module, y) for module in names.gate_up], -1).chunk(2, -1)
        gate, up = (first, second) if kind.gate_first else (second, first)
        x = x + kind.branch_scale * linear(at + names.down, F.silu(gate) * up)
    x = norm(names.norm, x) / kind.head_divisor
    head = tensors[f"{names.embedding if kind.tied else names.head}.weight"]
    if kind.unit_head:
        head = head / head.norm(dim=1, keepdim=True)
    return x @ head.t()


def _attention(kind: Kind, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [s, n d], k and v [s, g d] -> [s, n d]."""
    s = q.shape[0]
    q, k, v = (x.unflatten(-1, (-1, D)).transpose(0, 1) for x in (q, k, v))  # [n or g, s, d]
    if not kind.alibi:
        q, k = _rotate(kind, q), _rotate(kind, k)
    k, v = (x.repeat_interleave(N // kind.groups, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(D)
    if kind.alibi:  # Baichuan adds slope * position of the key, which differs from -slope * distance by row constants
        slopes = torch.tensor([2.0 ** (-8.0 / N * (i + 1)) for i in range(N)])
        scores = scores + slopes[:, None, None] * torch.arange(s)
    scores = scores + torch.full((s, s), float("-inf")).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _rotate(kind: Kind, x: Tensor) -> Tensor:
    """x [.., s, d]: pairs of channels as complex numbers, turned by position times frequency."""
    r = kind.rotated
    angles = torch.arange(x.shape[-2])[:, None] * kind.theta ** (-torch.arange(0, r, 2) / r)  # [s, r / 2]
    turned, rest = x[..., :r], x[..., r:]
    pairs = turned.unflatten(-1, (-1, 2)) if kind.neighbours else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angles))
    turned = turned if kind.neighbours else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), rest], -1)
