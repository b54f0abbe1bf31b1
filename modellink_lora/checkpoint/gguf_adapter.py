"""An adapter as a GGUF file that llama.cpp applies to a model in its own format (`llama-cli --lora adapter.gguf`).

llama.cpp adds scale * alpha / r * B A, with one alpha for the file and the rank of each lora_b. Where a projection's
scaling is another, what is missing is multiplied into its lora_b.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.peft import projections
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.errors import UserError
from modellink_lora.models.layouts import neighbours

FILE = "adapter.gguf"


@dataclass(frozen=True)
class _Architecture:
    name: str  # general.architecture
    permuted: bool  # whether llama.cpp keeps the rows of q and k with rotary pairs as neighbours


_LLAMA = _Architecture("llama", True)
_KNOWN = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _Architecture("qwen2", False),
    "qwen3": _Architecture("qwen3", False),
}


@dataclass(frozen=True)
class GgufPlan:
    """What the file will say."""

    architecture: _Architecture
    alpha: float  # as read back, in fp32
    names: Mapping[str, str]  # Hugging Face projection -> tensor of llama.cpp
    factors: Mapping[str, float]  # of lora_b, where not 1
    notes: tuple[str, ...]


def plan_gguf_adapter(adapter: Adapter) -> GgufPlan:
    """Raises UserError where llama.cpp has no such model, or the gguf package is missing."""
    gguf, model = _gguf(), adapter.meta.model
    architecture = _KNOWN.get(model.hf_model_type)
    if architecture is None:
        raise UserError(
            f"--save-model-type gguf-adapter is for {', '.join(_KNOWN)} models, {adapter.folder} adapts a "
            f"{model.hf_model_type} model: merge it and convert the Hugging Face folder with llama.cpp's script"
        )
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(kind, model.num_layers)
    names: dict[str, str] = {}
    rank_and_scaling: dict[str, tuple[int, float]] = {}
    for projection in projections(adapter):
        name = known.get_name(f"{projection.name}.weight", try_suffixes=(".weight",))
        assert name, f"gguf knows no {projection.name} of {architecture.name}"
        names[projection.name] = name
        rank_and_scaling[projection.name] = (len(projection.a), projection.scaling)
    products = Counter(np.float32(r * scaling) for r, scaling in rank_and_scaling.values())
    alpha = float(products.most_common(1)[0][0])
    factors = {name: scaling * r / alpha for name, (r, scaling) in rank_and_scaling.items()}
    # a ratio that fp32 cannot tell from 1 is alpha's own rounding
    factors = {name: factor for name, factor in factors.items() if not math.isclose(factor, 1, rel_tol=1e-7)}
    notes = []
    if factors:
        notes.append(f"the scaling of {len(factors)} projections, e.g. {next(iter(factors))}, is not alpha / r of the "
                     f"file's alpha {alpha:g}: the ratio is multiplied into their lora_b in fp32")  # fmt: skip
    return GgufPlan(architecture, alpha, names, factors, tuple(notes))


def write_gguf_adapter(path: Path, adapter: Adapter, plan: GgufPlan) -> None:
    """Write the file, factors in fp32."""
    gguf, model = _gguf(), adapter.meta.model
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_query_groups}
    with replacing_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, plan.architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, plan.alpha)
        for projection in projections(adapter):
            name, kind = plan.names[projection.name], projection.name.rsplit(".", 1)[-1]
            b = projection.b.double() * plan.factors.get(projection.name, 1.0)
            if plan.architecture.permuted and kind in heads:
                b = neighbours(b, heads[kind])
            writer.add_tensor(f"{name}.lora_a", projection.a.float().numpy())
            writer.add_tensor(f"{name}.lora_b", b.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf() -> Any:
    """The gguf package, which is not among the package's own requirements."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "--save-model-type gguf-adapter needs the package gguf, which is not installed: pip install gguf"
        ) from None
    return gguf
