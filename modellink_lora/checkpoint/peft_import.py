"""An adapter of the PEFT library as ours, exactly: projections that a fused linear joins keep factors of their own.

PEFT adapts q, k and v (and gate and up) one by one, so each has its own A and scaling; a fused linear has one A [r, in]
and one B [out, r]. The different A's are stacked, and each projection's B fills the columns of its own A and zeros
elsewhere: B A is then row for row what PEFT adds. A's that are equal bit for bit are kept once. blocks.py says where
each projection lies, so that exporting gives the same tensors again. Letters: r rank of one projection, R of the fused
factor.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter, AdapterMeta
from modellink_lora.checkpoint.blocks import Block, PeftOrigin, put_together_a, put_together_b
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.checkpoint.peft import CONFIG, TENSORS
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import Layout
from modellink_lora.models.shapes import full_shape
from modellink_lora.parallel.random import kaiming_uniform

ORIGIN = "PEFT"
# Settings that say how the adapter was trained, or that the tensors show; every other one must be off.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "ensure_weight_tying",
}  # fmt: skip
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}  # safetensors' names
# Other ways of starting change the base's weights as well.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class _Part:
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
    parts: tuple[_Part | None, ...]
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


def open_peft(folder: Path, *, flag: str, base: Callable[[], ModelConfig] | None) -> Adapter:
    """The adapter of a PEFT folder, put on a model of the dimensions `base()`.

    Raises UserError for a feature that our adapters do not have, by its name, and for tensors that do not fit.
    """
    settings = _settings(folder, flag)
    if not (folder / TENSORS).is_file():
        raise UserError(f"{flag} {folder}: holds no {TENSORS}; files of pickles (adapter_model.bin) are not read: "
                        "save the adapter with safe_serialization=True")  # fmt: skip
    if base is None:
        raise UserError(f"{flag} {folder}: a PEFT adapter does not tell the dimensions of its model: give the base too")
    config = base()
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            kinds = {name: file.get_slice(name).get_dtype() for name in found}
    except SafetensorError as error:
        raise UserError(f"{folder / TENSORS}: damaged or cut short ({error})") from None
    if strange := sorted(set(kinds.values()) - _DTYPES.keys()):
        raise UserError(f"{folder / TENSORS}: holds tensors of dtype {strange[0]}; F32, BF16 and F16 are supported")

    def load(part: _Part, factor: str) -> Tensor:
        with safe_open(folder / TENSORS, framework="pt") as file:
            return file.get_tensor(f"base_model.model.{part.name}.lora_{factor}.weight")

    parts = _parts(folder, found, kinds, settings, config)
    targets = tuple(name for name in TARGETS if name in {module.rsplit(".", 1)[-1] for module in parts})
    rslora = bool(settings.get("use_rslora"))
    fused = {module: _fuse(module, held, config, load, rslora=rslora) for module, held in parts.items()}
    bare = [m for m in _modules(config, targets) if m not in fused]
    shapes = {}
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

    folded = [m for m, x in fused.items() if x.is_folded]
    lora = _lora(settings, targets, fused, bare, wide="F32" in kinds.values() or bool(folded))
    origin = None
    if bare or not all(x.is_plain for x in fused.values()):
        missing = {m: (None,) * len(family_of(config.hf_model_type).tensor(f"{m}.weight", config).hf) for m in bare}
        origin = PeftOrigin(settings, {m: x.blocks for m, x in fused.items()} | missing)
    meta = AdapterMeta(lora, config, None, 0, peft=origin)
    return Adapter(folder, meta, shapes, ORIGIN, _notes(folder, fused, bare, folded), read)


def _settings(folder: Path, flag: str) -> dict[str, Any]:
    """adapter_config.json, after refusing what our adapters cannot express."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{flag} {folder}: holds no {CONFIG}, so rank and alpha of the adapter are unknown")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise UserError(f"{path}: expected a JSON object with peft_type")
    if settings["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type {settings['peft_type']} is not supported; LORA is")
    for name, value in settings.items():
        if value and name not in _HARMLESS:
            raise UserError(f"{path}: {name} {json.dumps(value)} is not supported")
    for name, allowed in (
        ("bias", (None, "none")), ("task_type", (None, "CAUSAL_LM")), ("init_lora_weights", _STARTS),
    ):  # fmt: skip
        if settings.get(name) not in allowed:
            raise UserError(f"{path}: {name} {json.dumps(settings[name])} is not supported")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        if not isinstance(settings.get(name), kind) or isinstance(settings[name], bool):
            raise UserError(f"{path}: {name} {settings.get(name)!r} is not a number")
    return settings


def _parts(
    folder: Path,
    found: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    settings: Mapping[str, Any],
    config: ModelConfig,
) -> dict[str, list[_Part | None]]:
    """Our module -> what PEFT has of each of its projections. Every tensor of the file must find its place."""
    places = {}
    for spec in family_of(config.hf_model_type).tensors(config):
        module, _, leaf = spec.name.rpartition(".")
        if leaf == "weight" and module.rsplit(".", 1)[-1] in TARGETS:
            blank = torch.empty(full_shape(spec.name, config), device="meta")
            for index, (hf, piece) in enumerate(zip(spec.hf, spec.layout.split(blank), strict=True)):
                places[hf.removesuffix(".weight")] = (module, index, tuple(piece.shape), len(spec.hf))
    parts: dict[str, list[_Part | None]] = {}
    for name in found:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise UserError(f"{folder / TENSORS}: holds {name}, which is no LoRA factor of a linear layer{_why(name)}")
        hf, factor = match.groups()
        if hf not in places:
            raise UserError(f"{folder / TENSORS}: adapts {hf}, which is not among the linears that can be adapted here "
                            f"({config.hf_model_type}, {config.num_layers} layers)")  # fmt: skip
        module, index, (rows, columns), count = places[hf]
        a, b = (found.get(f"base_model.model.{hf}.lora_{x}.weight") for x in "AB")
        r = int(_of_pattern(settings.get("rank_pattern"), hf, settings["r"]))
        if a != (r, columns) or b != (rows, r):
            raise UserError(f"{folder / TENSORS}: {hf} has lora_A {a} and lora_B {b}; {CONFIG} says rank {r} and the "
                            f"base's weight is ({rows}, {columns})")  # fmt: skip
        if factor == "A":
            alpha = float(_of_pattern(settings.get("alpha_pattern"), hf, settings["lora_alpha"]))
            if not alpha > 0:
                raise UserError(f"{folder / CONFIG}: the alpha {alpha:g} of {hf} is not above 0")
            scaling = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
            dtypes = tuple(_DTYPES[kinds[f"base_model.model.{hf}.lora_{x}.weight"]] for x in "AB")
            parts.setdefault(module, [None] * count)[index] = _Part(hf, r, alpha, scaling, (dtypes[0], dtypes[1]))
    if not parts:
        raise UserError(f"{folder / TENSORS}: holds no tensors")
    return parts


def _why(name: str) -> str:
    for mark, what in (
        ("lora_embedding_", "an adapter on embed_tokens"), ("lora_magnitude_vector", "use_dora"),
        (".lora_B.bias", "lora_bias"), ("modules_to_save", "modules_to_save"), (".weight", "modules_to_save"),
    ):  # fmt: skip
        if mark in name:
            return f": {what} is not supported"
    return ""


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches a whole tail of the path, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _modules(config: ModelConfig, targets: Sequence[str]) -> list[str]:
    names = (spec.name for spec in family_of(config.hf_model_type).tensors(config) if spec.name.endswith(".weight"))
    modules = (name.removesuffix(".weight") for name in names)
    return [module for module in modules if module.rsplit(".", 1)[-1] in targets]


def _fuse(
    module: str,
    parts: Sequence[_Part | None],
    config: ModelConfig,
    load: Callable[[_Part, str], Tensor],
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


def _fused_a(x: _Fused, load: Callable[[_Part, str], Tensor]) -> Tensor:
    """[R, in]"""
    at = {block.start: part for part, block in zip(x.parts, x.blocks, strict=True) if part and block}
    return put_together_a({start: load(part, "A") for start, part in at.items()})


def _fused_b(x: _Fused, load: Callable[[_Part, str], Tensor]) -> Tensor:
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
