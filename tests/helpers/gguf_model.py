"""Hugging Face folders as GGUF files, written with the gguf package's own names as llama.cpp's script writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

PERMUTED = ("llama", "mistral")  # models of which llama.cpp keeps q and k with rotary pairs side by side


def write_gguf(hf: Path, path: Path) -> None:
    """The model of the folder `hf`, in fp32 and without a vocabulary."""
    config = json.loads((hf / "config.json").read_text())
    family, layers = config["model_type"], config["num_hidden_layers"]
    arch = "llama" if family in PERMUTED else family
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, layers)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(hf.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, leaf = name.rsplit(".", 1)
            count = heads.get(module.rsplit(".", 1)[-1])
            tensor = permuted(tensor, count) if count and family in PERMUTED else tensor
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored and stored.endswith(leaf), name
            writer.add_tensor(stored, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Row i of a head's first half beside row i of its second."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + i + second * half for head in range(heads) for i in range(half) for second in (0, 1)]
    return rows[torch.tensor(order)]


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}


def value_of(path: Path, key: str) -> object:
    field = gguf.GGUFReader(path).get_field(key)
    return field.contents() if field else None


def with_adapter(model: Path, adapter: Path, *, scale: float = 1.0) -> dict[str, Tensor]:
    """The model's tensors with what llama.cpp adds to them for the adapter, in fp64."""
    weights = {name: tensor.double() for name, tensor in tensors_of(model).items()}
    factors, alpha = tensors_of(adapter), float(str(value_of(adapter, "adapter.lora.alpha")))
    for name in factors:
        if name.endswith(".lora_a"):
            a, b = factors[name].double(), factors[name[:-1] + "b"].double()
            weights[name.removesuffix(".lora_a")] += scale * alpha / b.shape[1] * (b @ a)
    assert len(factors) % 2 == 0
    return weights
