"""Conversions as tests run them: in this process, and a random adapter to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modellink_lora.checkpoint.adapter import AdapterMeta, base_fingerprint, write_adapter
from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.store import iteration_folder, write_tracker
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.convert.execute import run
from modellink_lora.models.shapes import full_shape

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def convert(load: Path, save: Path, *, to: str, lora_flags: dict[str, Any] | None = None, **fields: Any) -> str:
    """Convert `load` into `save` and return what was said. Whether `load` is Hugging Face's is seen from its files."""
    source = "hf" if (load / "config.json").exists() else "mg"
    said: list[str] = []
    config = ConvertConfig(
        load_dir=str(load), save_dir=str(save), load_model_type=source, save_model_type=to, **fields
    )  # fmt: skip
    run(config, lora_flags or {}, say=said.append)
    return "\n".join(said)


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def random_adapter(
    root: Path,
    base: Path,
    *,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 5,
    fingerprint: str | None = "of base",
    prompt_type: str | None = None,
    **lora: Any,
) -> Path:
    """Write an adapter with every factor random for the Hugging Face model `base`."""
    model = HfModel(base)
    config = LoraConfig(**{"r": 4, "alpha": 8.0, **lora}, target_modules=targets)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in model.names():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in targets or not name.endswith(".weight"):
            continue
        out_features, in_features = full_shape(name, model.config)
        r = config.rank_of(module)
        tensors[f"{module}.lora_A"] = torch.randn(r, in_features, generator=generator) * 0.1
        tensors[f"{module}.lora_B"] = torch.randn(out_features, r, generator=generator) * 0.1
    if fingerprint == "of base":
        fingerprint = base_fingerprint(model.config, model.read)
    write_adapter(iteration_folder(root, 7), tensors, AdapterMeta(config, model.config, fingerprint, 7, prompt_type))
    write_tracker(root, 7)
    return root
