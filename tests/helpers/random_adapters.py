"""Random adapters for property tests, made without a model: this program's own, and PEFT folders of every kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta, open_own, write_adapter
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.shapes import full_shape
from modellink_lora.parallel.partition import Partition

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALPHAS = st.sampled_from([0.1, 1.0, 3.0, 8.0, 16.0, 7.3])


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Dimensions of a small model; always divisible over two processes."""
    groups = draw(st.sampled_from([2, 4]))
    heads, width = groups * draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 4]))
    return ModelConfig(
        num_layers=draw(st.sampled_from([2, 4])), hidden_size=draw(st.sampled_from([16, 20])), vocab_size=32,
        num_attention_heads=heads, num_query_groups=groups, kv_channels=width, normalization="RMSNorm", swiglu=True,
        ffn_hidden_size=draw(st.sampled_from([12, 24])), max_position_embeddings=16, position_embedding_type="rope",
        untie_embeddings_and_output_weights=True, hf_model_type=draw(st.sampled_from(["llama", "mistral"])),
        params_dtype="bf16",
    )  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn, layers: int) -> tuple[int, Partition, str]:
    """(tensor parallel size, stages and chunks, spelling)"""
    choices = [Partition((layers,)), Partition((layers // 2,) * 2), Partition((layers - 1, 1))]
    if layers == 4:
        choices.append(Partition((1,) * 4, 2))
    return draw(st.sampled_from([1, 2])), draw(st.sampled_from(choices)), draw(st.sampled_from(["mcore", "legacy"]))


def weights(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Linear that can be adapted -> (shape of its weight, Hugging Face modules it joins)."""
    return {
        spec.name.removesuffix(".weight"): (full_shape(spec.name, config), [n.removesuffix(".weight") for n in spec.hf])
        for spec in family_of(config.hf_model_type).tensors(config)
        if spec.name.endswith(".weight") and spec.name.split(".")[-2] in TARGETS
    }


@st.composite
def own_adapters(draw: st.DrawFn, config: ModelConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings with patterns by kind and by module, and factors that are all random."""
    targets = tuple(t for t in TARGETS if draw(st.booleans())) or ("linear_proj",)
    modules = [module for module in weights(config) if module.rsplit(".", 1)[-1] in targets]
    keys = st.sampled_from([*targets, *modules])
    dtype = draw(st.sampled_from([None, "fp32"]))
    lora = LoraConfig(
        draw(st.integers(1, 5)), draw(ALPHAS), draw(st.sampled_from([0.0, 0.1])), targets, draw(st.booleans()), dtype,
        draw(st.dictionaries(keys, st.integers(1, 6), max_size=2)), draw(st.dictionaries(keys, ALPHAS, max_size=2)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors = {}
    for module in modules:
        (rows, columns), _ = weights(config)[module]
        for factor, shape in (("lora_A", (lora.rank_of(module), columns)), ("lora_B", (rows, lora.rank_of(module)))):
            tensors[f"{module}.{factor}"] = torch.randn(shape, generator=generator).to(KINDS[dtype or "bf16"])
    return lora, tensors


def write_own(folder: Path, config: ModelConfig, lora: LoraConfig, tensors: Mapping[str, Tensor]) -> Adapter:
    write_adapter(folder, tensors, AdapterMeta(lora, config, "0" * 32, 7, prompt_type="qwen"))
    return open_own(folder)


@st.composite
def peft_adapters(draw: st.DrawFn, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and tensors: any projections of any layers, with any ranks, alphas, dtypes and shared A's."""
    names = [name for _, parts in weights(config).values() for name in parts]
    adapted = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    some = st.sampled_from(adapted)
    ranks, alphas = draw(st.dictionaries(some, st.integers(1, 4))), draw(st.dictionaries(some, ALPHAS))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(ALPHAS), "lora_dropout": 0.05, "use_rslora": draw(st.booleans()), "bias": "none",
        "target_modules": sorted(adapted), "rank_pattern": ranks, "alpha_pattern": alphas, "modules_to_save": None,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    kind = st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16])
    common, tensors, last = draw(kind), {}, torch.zeros(0)
    for (rows, columns), parts in weights(config).values():
        for name in parts:
            if name not in adapted:
                continue
            shape = (ranks.get(name, settings["r"]), columns)
            a = torch.randn(shape, generator=generator).to(draw(st.sampled_from([common, draw(kind)])))
            a = last if draw(st.booleans()) and last.shape == shape else a
            b = torch.randn(_rows(config, name, rows), shape[0], generator=generator).to(common)
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a.clone(),
                f"base_model.model.{name}.lora_B.weight": b,
            }
            last = a
    return settings, tensors


def write_peft_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def _rows(config: ModelConfig, name: str, fused: int) -> int:
    by_projection = {"q_proj": config.query_width, "k_proj": config.kv_width, "v_proj": config.kv_width,
                     "gate_proj": config.ffn_hidden_size, "up_proj": config.ffn_hidden_size}  # fmt: skip
    return by_projection.get(name.rsplit(".", 1)[-1], fused)
