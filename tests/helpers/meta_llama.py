"""Meta's Llama as its published code computes it, from the files of a folder; nothing of the product is used here.

Letters: s sequence, h hidden, n query heads, g key/value heads, d head width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # row-parallel linears; all others are cut by rows


def params_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "params.json").read_text())


def gathered(folder: Path, *, embedding: int = 1) -> dict[str, Tensor]:
    """The tensors of all model-parallel ranks put together; the embedding along this dimension (Llama 3: 0)."""
    ranks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    whole = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if "norm" in name:
            assert all(torch.equal(part, first) for part in parts), name
            whole[name] = first
        else:
            dim = embedding if name == "tok_embeddings.weight" else int(name.endswith(_COLUMNS))
            whole[name] = torch.cat(parts, dim)
    return whole


def logits(weights: dict[str, Tensor], params: dict[str, Any], ids: list[int]) -> Tensor:
    """[s, vocabulary], in fp32"""
    n, h = params["n_heads"], params["dim"]
    g, d = params.get("n_kv_heads", n), h // n
    assert weights["layers.0.feed_forward.w1.weight"].shape[0] == ffn_width(params)
    frequencies = 1.0 / params.get("rope_theta", 10000.0) ** (torch.arange(0, d, 2).float() / d)
    if params.get("use_scaled_rope"):
        frequencies = torch.tensor([_scaled(float(x)) for x in frequencies])
    angles = torch.outer(torch.arange(len(ids)).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [s, 1, d/2]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weights[f"{name}.weight"]

    def turned(x: Tensor, heads: int) -> Tensor:
        pairs = torch.view_as_complex(x.view(len(ids), heads, d // 2, 2))  # channels 2 i and 2 i + 1
        return torch.view_as_real(pairs * turn).flatten(2)

    x = F.embedding(torch.tensor(ids), weights["tok_embeddings.weight"])
    future = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for layer in range(params["n_layers"]):

        def linear(y: Tensor, name: str, at: str = f"layers.{layer}.") -> Tensor:
            return F.linear(y, weights[f"{at}{name}.weight"])

        y = norm(x, f"layers.{layer}.attention_norm")
        q, k = turned(linear(y, "attention.wq"), n), turned(linear(y, "attention.wk"), g)
        k = k.repeat_interleave(n // g, 1)
        v = linear(y, "attention.wv").view(len(ids), g, d).repeat_interleave(n // g, 1)
        scores = torch.einsum("qnd,knd->nqk", q, k) / math.sqrt(d) + future
        x = x + linear(torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).flatten(1), "attention.wo")
        y = norm(x, f"layers.{layer}.ffn_norm")
        x = x + linear(F.silu(linear(y, "feed_forward.w1")) * linear(y, "feed_forward.w3"), "feed_forward.w2")
    return F.linear(norm(x, "norm"), weights["output.weight"])


def ffn_width(params: dict[str, Any]) -> int:
    """Rows of w1 in a model that Meta's code builds."""
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    return multiple * ((hidden + multiple - 1) // multiple)


def _scaled(frequency: float) -> float:
    """Llama 3.1's: long waves 8 times slower, short ones as they are, between 2048 and 8192 positions in between."""
    length = 2 * math.pi / frequency
    if length < 8192 / 4:
        return frequency
    if length > 8192:
        return frequency / 8
    share = (8192 / length - 1) / (4 - 1)
    return (1 - share) * frequency / 8 + share * frequency


def as_hugging_face(weights: dict[str, Tensor], params: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of transformers' LlamaForCausalLM, as its conversion script makes them."""
    modules = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    heads = {"attention.wq": params["n_heads"], "attention.wk": params.get("n_kv_heads", params["n_heads"])}
    ends = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    found = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if module in ends:
            found[f"{ends[module]}.weight"] = tensor
            continue
        _, layer, kind = module.split(".", 2)
        if kind in heads:  # even channels of a head first, then the odd ones
            by_head = tensor.view(heads[kind], -1, tensor.shape[1])
            tensor = torch.cat([by_head[:, 0::2], by_head[:, 1::2]], 1).reshape(tensor.shape)
        found[f"model.layers.{layer}.{modules[kind]}.weight"] = tensor
    return found
