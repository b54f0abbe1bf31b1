"""Adapters that adapt Hugging Face's projections one by one, as ours: each fused linear gets the factors of its own.

The different A's are stacked, and each projection's B fills the columns of its own A and zeros elsewhere. A's that are
equal bit for bit are kept once. Letters: r rank of one projection, R of the fused factor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta
from modellink_lora.checkpoint.blocks import Block, PeftOrigin, put_together_a, put_together_b
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import Layout
from modellink_lora.models.shapes import full_shape
from modellink_lora.parallel.random import kaiming_uniform


@dataclass(frozen=True)
class Part:
    """The factors of one Hugging Face projection."""

    name: str  # e.g. model.layers.0.self_attn.q_proj
    r: int
    alpha: float
    scaling: float
    dtypes: tuple[str, str]  # of lora_A and lora_B


@dataclass(frozen=True)
class _Fused:
    """One of our linears: what PEFT has of each projection, and where it lies in the fused factors."""

    layout: Layout
    rows: tuple[int, ...]  # of each projection
    parts: tuple[Part | None, ...]
    blocks: tuple[Block | None, ...]
    r: int
    alpha: float
    scaling: float

    @property
    def is_plain(self) -> bool:
        """Whether the projections differ in nothing but their rows of B, as ours do."""
        return len(set(self.blocks)) == 1

    @property
    def is_folded(self) -> bool:
        return any(not math.isclose(part.scaling, self.scaling, rel_tol=1e-12) for part in self.parts if part)


def assemble(
    folder: Path,
    parts: Mapping[str, Sequence[Part | None]],
    load: Callable[[Part, str], Tensor],
    settings: Mapping[str, Any],
    config: ModelConfig,
    *,
    origin: str,
    iteration: int = 0,
    keep: bool = False,
) -> Adapter:
    """The adapter whose linears (keys of `parts`) have these factors of projections.

    Args:
        load: (part, "A" or "B") -> its factor.
        settings: PEFT's adapter_config.json, which exporting writes again.
        keep: keep them although ours would say the same of these factors.
    """
    targets = tuple(name for name in TARGETS if name in {module.rsplit(".", 1)[-1] for module in parts})
    rslora = bool(settings.get("use_rslora"))
    fused = {module: _fuse(module, held, config, load, rslora=rslora) for module, held in parts.items()}
    bare = [m for m in _modules(config, targets) if m not in fused]
    shapes: dict[str, tuple[int, int]] = {}
    for module in _modules(config, targets):
        out_features, in_features = full_shape(f"{module}.weight", config)
        r = fused[module].r if module in fused else settings["r"]
        shapes |= {f"{module}.lora_A": (r, in_features), f"{module}.lora_B": (out_features, r)}

    def read(name: str) -> Tensor:
        module, _, factor = name.rpartition(".")
        if module not in fused:
            # a new adapter: it adds nothing, and can learn
            return kaiming_uniform(name, shapes[name], seed=0) if factor == "lora_A" else torch.zeros(shapes[name])
        return _fused_a(fused[module], load) if factor == "lora_A" else _fused_b(fused[module], load)

    wide = any("fp32" in part.dtypes for held in parts.values() for part in held if part)
    folded = [m for m, x in fused.items() if x.is_folded]
    lora = _lora(settings, targets, fused, bare, wide=wide or bool(folded))
    kept = None
    if keep or bare or not all(x.is_plain for x in fused.values()):
        missing: dict[str, tuple[Block | None, ...]] = {
            m: (None,) * len(family_of(config.hf_model_type).tensor(f"{m}.weight", config).hf) for m in bare
        }
        kept = PeftOrigin(dict(settings), {**{m: x.blocks for m, x in fused.items()}, **missing})
    meta = AdapterMeta(lora, config, None, iteration, peft=kept)
    return Adapter(folder, meta, shapes, origin, _notes(folder, fused, bare, folded), read)


def _modules(config: ModelConfig, targets: Sequence[str]) -> list[str]:
    names = (spec.name for spec in family_of(config.hf_model_type).tensors(config) if spec.name.endswith(".weight"))
    modules = (name.removesuffix(".weight") for name in names)
    return [module for module in modules if module.rsplit(".", 1)[-1] in targets]


def _fuse(
    module: str,
    parts: Sequence[Part | None],
    config: ModelConfig,
    load: Callable[[Part, str], Tensor],
    *,
    rslora: bool,
) -> _Fused:
    """Place the projections' A's one below the other, equal ones of equal scaling on top of each other."""
    kept: list[tuple[Tensor, int]] = []  # (A, first row)
    blocks: list[Block | None] = []
    r = 0
    for part in parts:
        if part is None:
            blocks.append(None)
            continue
        a = load(part, "A")
        same = [start for other, start in kept if other.dtype == a.dtype and torch.equal(other, a)]
        blocks.append(Block(same[0] if same else r, part.r, part.alpha, part.dtypes))
        if not same:
            kept.append((a, r))
            r += part.r
    layout = family_of(config.hf_model_type).tensor(f"{module}.weight", config).layout
    blank = torch.empty(full_shape(f"{module}.weight", config), device="meta")
    rows = tuple(piece.shape[0] for piece in layout.split(blank))
    first = next(part for part in parts if part)  # its scaling is the whole linear's, with the alpha that gives it
    alpha = first.alpha if r == first.r else first.alpha * (math.sqrt(r / first.r) if rslora else r / first.r)
    return _Fused(layout, rows, tuple(parts), tuple(blocks), r, alpha, alpha / (math.sqrt(r) if rslora else r))


def _fused_a(x: _Fused, load: Callable[[Part, str], Tensor]) -> Tensor:
    """[R, in]"""
    at = {block.start: part for part, block in zip(x.parts, x.blocks, strict=True) if part and block}
    return put_together_a({start: load(part, "A") for start, part in at.items()})


def _fused_b(x: _Fused, load: Callable[[Part, str], Tensor]) -> Tensor:
    """[out, R], rows in the order of the fused weight"""
    factors = [load(part, "B") if part else None for part in x.parts]  # [out of the projection, r]
    return put_together_b(factors, x.blocks, x.layout, rows=x.rows, r=x.r)


def _lora(
    settings: Mapping[str, Any], targets: tuple[str, ...], fused: Mapping[str, _Fused], bare: list[str], *, wide: bool
) -> LoraConfig:
    r, alpha, rslora = settings["r"], float(settings["lora_alpha"]), bool(settings.get("use_rslora"))
    ranks = {module: x.r for module, x in fused.items()} | dict.fromkeys(bare, r)
    alphas = {module: x.alpha for module, x in fused.items()} | dict.fromkeys(bare, alpha)
    # fp32 factors stay so on a base of 16 bits, as PEFT itself keeps them
    return LoraConfig(
        r, alpha, float(settings.get("lora_dropout") or 0.0), targets, rslora, "fp32" if wide else None,
        _pattern(ranks, r), _pattern(alphas, alpha),
    )  # fmt: skip


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern for LoraConfig: the commonest value of a kind of linear by its short name, others by their full one."""
    pattern = {}
    for kind in {module.rsplit(".", 1)[-1]: None for module in values}:
        own = {module: value for module, value in values.items() if module.endswith("." + kind)}
        common = Counter(own.values()).most_common(1)[0][0]
        if common != default:
            pattern[kind] = common
        pattern |= {module: value for module, value in own.items() if value != common}
    return pattern


def _notes(folder: Path, fused: Mapping[str, _Fused], bare: list[str], folded: list[str]) -> tuple[str, ...]:
    """What differs from the adapter as PEFT would go on training it."""
    notes = []
    own = {m.rsplit(".", 1)[-1]: x.r for m, x in fused.items() if len({block.start for block in x.blocks if block}) > 1}
    if own:
        what = ", ".join(f"{kind} of rank {r}" for kind, r in own.items())
        notes.append(f"{folder}: projections with a lora_A of their own are kept side by side in {what}; exported "
                     "again they come apart as they were, unless training on mixes them")  # fmt: skip
    some = sorted({kind for module, x in fused.items() if None in x.parts for kind in [module.rsplit(".", 1)[-1]]})
    if some:
        notes.append(f"{folder}: adapts a part of {' and '.join(some)} only; the rest has zeros in lora_B, which "
                     "training on will fill")  # fmt: skip
    if folded:
        notes.append(f"{folder}: alpha / r differs among the projections of {len(folded)} linears, e.g. {folded[0]}; "
                     "the ratio is multiplied into lora_B in fp32 where it is used")  # fmt: skip
    if bare:
        notes.append(f"{folder}: leaves out {len(bare)} linears, e.g. {bare[0]}; they get new factors with zeros in "
                     "lora_B, which training on will fill")  # fmt: skip
    return tuple(notes)
