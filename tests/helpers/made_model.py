"""Hugging Face models written straight to safetensors: any dimensions in a millisecond, without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama-like model; `experts` make it a mixture (family mixtral or qwen2_moe, whose shared one has 2 ffn)."""

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
    experts: int = 0


def made_model(folder: Path, size: Dimensions, *, seed: int = 0) -> Path:
    """Write config.json and model.safetensors; every value is random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.05).to(size.dtype) for name, shape in shapes(size).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(folder, size)
    return folder


def made_sharded_model(folder: Path, size: Dimensions, *, tensors_a_file: int = 60, seed: int = 0) -> Path:
    """The same in several files, for models that no memory should have to hold."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    all_, where = list(shapes(size).items()), {}
    groups = [all_[start : start + tensors_a_file] for start in range(0, len(all_), tensors_a_file)]
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: (torch.randn(shape, generator=generator) * 0.05).to(size.dtype) for name, shape in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    _write_config(folder, size)
    return folder


def shapes(size: Dimensions) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor."""
    h, q, kv = size.hidden, size.heads * size.head_dim, size.groups * size.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab, h), "model.norm.weight": (h,)}
    if not size.tied:
        found["lm_head.weight"] = (size.vocab, h)
    for layer in range(size.layers):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (q, h),
                "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
                **_mlp_shapes(size),
            }.items()
        }  # fmt: skip
        if size.family in ("qwen2", "qwen2_moe"):
            rows = {"q": q, "k": kv, "v": kv}
            found |= {f"model.layers.{layer}.self_attn.{p}_proj.bias": (rows[p],) for p in rows}
    return found


def _mlp_shapes(size: Dimensions) -> dict[str, tuple[int, ...]]:
    def mlp(at: str, gate: str, up: str, down: str, width: int) -> dict[str, tuple[int, ...]]:
        h = size.hidden
        return {f"{at}.{gate}": (width, h), f"{at}.{up}": (width, h), f"{at}.{down}": (h, width)}

    names = ("gate_proj", "up_proj", "down_proj")
    if not size.experts:
        return mlp("mlp", *names, size.ffn)
    found: dict[str, tuple[int, ...]] = {}
    block, linears = ("block_sparse_moe", ("w1", "w3", "w2")) if size.family == "mixtral" else ("mlp", names)
    for expert in range(size.experts):
        found |= mlp(f"{block}.experts.{expert}", *linears, size.ffn)
    if size.family == "qwen2_moe":
        found |= mlp("mlp.shared_expert", *names, 2 * size.ffn)
        found["mlp.shared_expert_gate"] = (1, size.hidden)
    return {**found, f"{block}.gate": (size.experts, size.hidden)}


def _write_config(folder: Path, size: Dimensions) -> None:
    config = {
        "model_type": size.family, "architectures": ["LlamaForCausalLM"], "vocab_size": size.vocab,
        "hidden_size": size.hidden, "intermediate_size": size.ffn, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.groups, "head_dim": size.head_dim,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": size.tied, "hidden_act": "silu", "torch_dtype": str(size.dtype).removeprefix("torch."),
    }  # fmt: skip
    if size.experts:
        config |= {"num_experts_per_tok": 2}
        config |= {"num_local_experts" if size.family == "mixtral" else "num_experts": size.experts}
    if size.experts and size.family != "mixtral":
        config["moe_intermediate_size"] = size.ffn
    if size.family == "qwen2_moe":
        config["shared_expert_intermediate_size"] = 2 * size.ffn
    (folder / "config.json").write_text(json.dumps(config))
