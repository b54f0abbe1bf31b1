"""An adapter as a folder that the PEFT library loads unmodified: adapter_config.json and adapter_model.safetensors.

PEFT adapts q, k and v (and gate and up) one by one. Ours shares one lora_A among them, so each gets a copy of A and its
own rows of B, which the layout of the fused weight picks out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.models.families import family_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(folder: Path, adapter: Adapter, *, base_model: str | None) -> list[str]:
    """Write `adapter` into `folder`, dtype as trained; names of the tensors written."""
    tensors = dict(peft_tensors(adapter))
    with replacing_file(folder / TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(peft_config(adapter, base_model=base_model), indent=2) + "\n", encoding="utf-8")
    return list(tensors)


def peft_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(PEFT name, tensor) of every factor."""
    for module, projections in _projections(adapter):
        spec = family_of(adapter.meta.model.hf_model_type).tensor(f"{module}.weight", adapter.meta.model)
        a = adapter.read(f"{module}.lora_A")  # [r, in]
        parts = spec.layout.split(adapter.read(f"{module}.lora_B"))  # of [out, r]
        for projection, b in zip(projections, parts, strict=True):
            yield f"base_model.model.{projection}.lora_A.weight", a.clone()
            yield f"base_model.model.{projection}.lora_B.weight", b.contiguous()


def peft_config(adapter: Adapter, *, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json. Patterns name full module paths, which PEFT matches as suffixes."""
    lora = adapter.meta.lora
    projections = dict(_projections(adapter))
    ranks = {p: lora.rank_of(module) for module, parts in projections.items() for p in parts}
    alphas = {p: lora.alpha_of(module) for module, parts in projections.items() for p in parts}
    layers = {p.split(".")[2] for p in ranks}
    short = sorted({p.rsplit(".", 1)[-1] for p in ranks})
    everywhere = len(ranks) == len(short) * len(layers) == len(short) * adapter.meta.model.num_layers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": short if everywhere else sorted(ranks),
        "rank_pattern": {p: r for p, r in ranks.items() if r != lora.r},
        "alpha_pattern": {p: alpha for p, alpha in alphas.items() if alpha != lora.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
    }


def _projections(adapter: Adapter) -> Iterator[tuple[str, list[str]]]:
    """(our fused module, Hugging Face modules it consists of)."""
    model = adapter.meta.model
    family = family_of(model.hf_model_type)
    for module in adapter.modules:
        parts = family.tensor(f"{module}.weight", model).hf
        yield module, [part.removesuffix(".weight") for part in parts]
