"""An adapter as a folder that the PEFT library loads unmodified: adapter_config.json and adapter_model.safetensors.

PEFT adapts q, k and v (and gate and up) one by one. Ours shares one lora_A among them, so each gets a copy of A and its
own rows of B, which the layout of the fused weight picks out. An adapter that came from PEFT, and was not trained on,
comes apart into the tensors and settings that it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.blocks import take_apart
from modellink_lora.checkpoint.store import replacing_set
from modellink_lora.config.document import to_json
from modellink_lora.models.families import family_of

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def write_peft(folder: Path, adapter: Adapter, *, base_model: str | None) -> list[str]:
    """Write `adapter` into `folder`, dtype as trained; names of the tensors written."""
    tensors = dict(peft_tensors(adapter))
    write_peft_files(folder, tensors, peft_config(adapter, base_model=base_model))
    return list(tensors)


def write_peft_files(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write both files of a PEFT folder together: whoever looks sees the old adapter or the new one."""
    with replacing_set(folder, CONFIG, instead_of=(TENSORS, PICKLED)) as temporary:
        save_file(dict(tensors), temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(to_json(settings, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Projection:
    """The factors of one Hugging Face projection: W' = W + scaling * B A."""

    name: str  # e.g. model.layers.0.self_attn.q_proj
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float


def projections(adapter: Adapter) -> Iterator[Projection]:
    """Every projection that `adapter` adapts, one by one."""
    for module in adapter.modules:
        layout, origin, lora = adapter.layout(module), adapter.meta.peft, adapter.meta.lora
        a, b = adapter.stored(f"{module}.lora_A"), adapter.stored(f"{module}.lora_B")  # [R, in], [out, R]
        names = adapter.projections(module)
        if origin:
            blocks = origin.blocks[module]
            for name, block, pair in zip(names, blocks, take_apart(a, b, layout, blocks), strict=True):
                if block and pair:
                    yield Projection(name, *pair, block.scaling(rslora=lora.use_rslora))
        else:
            for name, part in zip(names, layout.split(b), strict=True):
                yield Projection(name, a.clone(), part.contiguous(), lora.scaling_of(module))


def peft_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(PEFT name, tensor) of everything in the file."""
    for projection in projections(adapter):
        yield f"base_model.model.{projection.name}.lora_A.weight", projection.a
        yield f"base_model.model.{projection.name}.lora_B.weight", projection.b
    yield from whole_tensors(adapter)


def whole_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(PEFT name, tensor) of embedding, head and norms that the adapter holds anew (modules_to_save)."""
    model = adapter.meta.model
    for name in sorted(adapter.replaced):
        (hf,) = family_of(model.hf_model_type).tensor(name, model).hf
        yield f"base_model.model.{hf}", adapter.stored(name)


def peft_config(adapter: Adapter, *, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json. Patterns name full module paths, which PEFT matches as suffixes."""
    if origin := adapter.meta.peft:
        named = {"base_model_name_or_path": base_model} if base_model else {}
        return {**origin.settings, **named}
    lora = adapter.meta.lora
    found = {module: adapter.projections(module) for module in adapter.modules}
    ranks = {p: lora.rank_of(module) for module, parts in found.items() for p in parts}
    alphas = {p: lora.alpha_of(module) for module, parts in found.items() for p in parts}
    count = adapter.meta.model.num_layers
    settings = settings_of(ranks, alphas, r=lora.r, alpha=lora.alpha, num_layers=count, base_model=base_model)
    return settings | {"lora_dropout": lora.dropout, "use_rslora": lora.use_rslora}


def settings_of(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    r: int,
    alpha: float,
    num_layers: int,
    base_model: str | None,
) -> dict[str, Any]:
    """adapter_config.json of an adapter on the Hugging Face modules `ranks`."""
    layers = {p.split(".")[2] for p in ranks}
    short = sorted({p.rsplit(".", 1)[-1] for p in ranks})
    everywhere = len(ranks) == len(short) * len(layers) == len(short) * num_layers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": short if everywhere else sorted(ranks),
        "rank_pattern": {p: rank for p, rank in ranks.items() if rank != r},
        "alpha_pattern": {p: value for p, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
    }


def scalings(adapter: Adapter) -> set[float]:
    """alpha / r of every projection. Loaders that read no patterns, such as vLLM's, need a single one."""
    lora, origin = adapter.meta.lora, adapter.meta.peft
    if origin is None:
        return {lora.scaling_of(module) for module in adapter.modules}
    parts = [block for blocks in origin.blocks.values() for block in blocks if block]
    return {block.scaling(rslora=lora.use_rslora) for block in parts}
