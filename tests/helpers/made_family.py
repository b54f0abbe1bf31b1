"""Hugging Face models of any family and dimensions, their tensors named and arranged by the family's own table.

The table itself is checked against transformers and published descriptions in tests/parity; this is for what must hold
of every table: that no byte is lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modellink_lora.models.families import family_of
from modellink_lora.models.shapes import full_shape
from tests.helpers.made_model import Dimensions

_Document = dict[str, Any]


def _llama(size: Dimensions) -> _Document:
    return {
        "hidden_size": size.hidden, "intermediate_size": size.ffn, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.groups, "head_dim": size.head_dim,
        "max_position_embeddings": 64, "vocab_size": size.vocab, "tie_word_embeddings": size.tied,
    }  # fmt: skip


def _own_heads(size: Dimensions) -> _Document:
    """Of a family that has no groups and no width of heads of its own."""
    found = _llama(size)
    del found["num_key_value_heads"], found["head_dim"]
    return {**found, "hidden_size": size.heads * size.head_dim}


def _chatglm(size: Dimensions) -> _Document:
    return {
        "num_layers": size.layers, "hidden_size": size.hidden, "ffn_hidden_size": size.ffn,
        "kv_channels": size.head_dim,
        "num_attention_heads": size.heads, "multi_query_attention": True, "multi_query_group_num": size.groups,
        "seq_length": 64, "padded_vocab_size": size.vocab, "add_qkv_bias": True,
    }  # fmt: skip


def _qwen(size: Dimensions) -> _Document:
    return {**_own_heads(size), "intermediate_size": 2 * size.ffn, "kv_channels": size.head_dim, "seq_length": 64}


def _bloom(size: Dimensions) -> _Document:
    return {"hidden_size": size.heads * size.head_dim, "n_layer": size.layers, "n_head": size.heads,
            "vocab_size": size.vocab, "tie_word_embeddings": size.tied}  # fmt: skip


# model_type -> its config.json
DOCUMENTS: dict[str, Callable[[Dimensions], _Document]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "glm", "glm4", "internlm2", "minicpm"), _llama
    ),
    **dict.fromkeys(("internlm", "baichuan", "index"), _own_heads),
    "chatglm": _chatglm, "qwen": _qwen, "bloom": _bloom,
}  # fmt: skip


def made_family(folder: Path, size: Dimensions, *, seed: int = 0) -> Path:
    """Write config.json and model.safetensors of a model of `size.family`; every value is random."""
    document = {**DOCUMENTS[size.family](size), "model_type": size.family}
    if size.family not in ("chatglm", "qwen", "bloom"):
        document["hidden_act"] = "silu"
    if size.family.startswith("gemma"):
        document["hidden_act"] = "gelu_pytorch_tanh"
    document["torch_dtype"] = str(size.dtype).removeprefix("torch.")
    family = family_of(size.family)
    config = family.read_config(document)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in family.tensors(config):
        full = torch.randn(full_shape(spec.name, config), generator=generator).to(size.dtype)
        tensors |= {name: part.contiguous() for name, part in zip(spec.hf, spec.layout.split(full), strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(document))
    return folder
