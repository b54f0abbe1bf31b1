"""Hugging Face models written straight to safetensors: any dimensions in a millisecond, without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama-like model."""

    layers: int = 2
    heads: int = 4
    groups: int = 2
    head_dim: int = 4
    hidden: int = 8
    ffn: int = 12
    vocab: int = 19
    tied: bool = False
    dtype: torch.dtype = torch.float32
    family: str = "llama"


def made_model(folder: Path, size: Dimensions, *, seed: int = 0) -> Path:
    """Write config.json and model.safetensors; every value is random, every bit pattern of a value's dtype possible."""
    h, q, kv = size.hidden, size.heads * size.head_dim, size.groups * size.head_dim
    shapes = {"model.embed_tokens.weight": (size.vocab, h), "model.norm.weight": (h,)}
    if not size.tied:
        shapes["lm_head.weight"] = (size.vocab, h)
    for layer in range(size.layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (q, h),
                "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
                "mlp.gate_proj": (size.ffn, h), "mlp.up_proj": (size.ffn, h), "mlp.down_proj": (h, size.ffn),
            }.items()
        }  # fmt: skip
        if size.family == "qwen2":
            rows = {"q": q, "k": kv, "v": kv}
            shapes |= {f"model.layers.{layer}.self_attn.{p}_proj.bias": (rows[p],) for p in rows}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.05).to(size.dtype) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": size.family, "architectures": ["LlamaForCausalLM"], "vocab_size": size.vocab, "hidden_size": h,
        "intermediate_size": size.ffn, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups, "head_dim": size.head_dim, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": size.tied, "hidden_act": "silu",
        "torch_dtype": str(size.dtype).removeprefix("torch."),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
