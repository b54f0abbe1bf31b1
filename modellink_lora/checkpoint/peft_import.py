"""An adapter of the PEFT library as ours, exactly: projections that a fused linear joins keep factors of their own.

PEFT adapts q, k and v (and gate and up) one by one, so each has its own A and scaling; a fused linear has one A [r, in]
and one B [out, r]. The different A's are stacked, and each projection's B fills the columns of its own A and zeros
elsewhere: B A is then row for row what PEFT adds. A's that are equal bit for bit are kept once. blocks.py says where
each projection lies, so that exporting gives the same tensors again. Letters: r rank of one projection, R of the fused
factor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.checkpoint.peft import CONFIG, PICKLED, TENSORS
from modellink_lora.checkpoint.peft_names import check_patterns, factor, factor_of, named_by, reason_against, spelled
from modellink_lora.checkpoint.projections import Part, assemble
from modellink_lora.checkpoint.unpickle import load_tensors
from modellink_lora.config.document import read_document, typed
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import Replicated, Vocab
from modellink_lora.models.shapes import full_shape

ORIGIN = "PEFT"
# Settings that say how the adapter was trained, or that the tensors show; every other one must be off.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "ensure_weight_tying",
}  # fmt: skip
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}  # safetensors' names
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Other ways of starting change the base's weights as well.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_HIGHEST_RANK, _HIGHEST_ALPHA = 1 << 20, 1e9


@dataclass(frozen=True)
class _File:
    """The tensors of a PEFT folder by the names that save_pretrained gives them."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # of ours
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class _Settings:
    """The types of what is used of adapter_config.json; checked, the document itself is kept."""

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None
    bias: str | None = None
    task_type: str | None = None
    init_lora_weights: bool | str | None = None


def open_peft(folder: Path, *, flag: str, base: Callable[[], ModelConfig] | None) -> Adapter:
    """The adapter of a PEFT folder, put on a model of the dimensions `base()`.

    Raises UserError for a feature that our adapters do not have, by its name, and for tensors that do not fit.
    """
    settings = _settings(folder, flag)
    file = _open_file(folder, flag)
    if base is None:
        raise UserError(f"{flag} {folder}: a PEFT adapter does not tell the dimensions of its model: give the base too")
    config = base()

    def load(part: Part, letter: str) -> Tensor:
        return file.read(factor(part.name, letter))

    whole = {name: file.shapes[name] for name in sorted(file.shapes) if factor_of(name) is None}
    replaced = _replaced(file.path, whole, settings, config)
    adapter = assemble(
        folder, _parts(file, settings, config), load, settings, config, origin=ORIGIN, keep=bool(replaced)
    )  # fmt: skip
    if file.path.name == TENSORS and (folder / PICKLED).is_file():
        adapter = dataclasses.replace(adapter, notes=(*adapter.notes, f"{folder / PICKLED} is not read: {TENSORS} is"))
    if not replaced:
        return adapter
    reader = adapter.reader
    assert reader is not None

    def read(name: str) -> Tensor:
        return file.read(replaced[name]) if name in replaced else reader(name)

    notes = (*adapter.notes, f"{folder}: {', '.join(sorted(replaced))} are taken from it as a whole (modules_to_save)")
    return dataclasses.replace(adapter, notes=notes, replaced=frozenset(replaced), reader=read)


def _open_file(folder: Path, flag: str) -> _File:
    path = folder / TENSORS
    shapes: dict[str, tuple[int, ...]]
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                dtypes = {name: file.get_slice(name).get_dtype() for name in shapes}
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or cut short ({error})") from None

        def one(name: str) -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        read: Callable[[str], Tensor] = one
    elif (folder / PICKLED).is_file():
        path = folder / PICKLED
        tensors = load_tensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        dtypes = {name: _NAMES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
        read = tensors.__getitem__
    else:
        raise UserError(f"{flag} {folder}: holds neither {TENSORS} nor {PICKLED}, so the adapter has no tensors")
    if strange := sorted(set(dtypes.values()) - _DTYPES.keys()):
        raise UserError(f"{path}: holds tensors of dtype {strange[0]}; F32, BF16 and F16 are supported")
    names = spelled(shapes, where=str(path))
    return _File(
        path,
        {plain: shapes[name] for plain, name in names.items()},
        {plain: _DTYPES[dtypes[name]] for plain, name in names.items()},
        lambda plain: read(names[plain]),
    )


def _settings(folder: Path, flag: str) -> dict[str, Any]:
    """adapter_config.json, after refusing what our adapters cannot express."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{flag} {folder}: holds no {CONFIG}, so rank and alpha of the adapter are unknown")
    settings = read_document(path, dict[str, Any])
    if "peft_type" not in settings:
        raise UserError(f"{path}: lacks peft_type, so it is not PEFT's")
    if settings["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type {settings['peft_type']} is not supported; LORA is")
    for name, value in settings.items():
        if value and name not in _HARMLESS and name != "modules_to_save":
            raise UserError(f"{path}: {name} {json.dumps(value)} is not supported")
    for name, allowed in (
        ("bias", (None, "none")), ("task_type", (None, "CAUSAL_LM")), ("init_lora_weights", _STARTS),
    ):  # fmt: skip
        if settings.get(name) not in allowed:
            raise UserError(f"{path}: {name} {json.dumps(settings[name])} is not supported")
    typed(settings, _Settings, where=str(path))
    ranks = {"r": settings["r"], **(settings.get("rank_pattern") or {})}
    if low := [f"{name} {r}" for name, r in ranks.items() if not 1 <= r <= _HIGHEST_RANK]:
        raise UserError(f"{path}: {low[0]}: a rank is a whole number from 1 to {_HIGHEST_RANK}")
    alphas = {"lora_alpha": settings["lora_alpha"], **(settings.get("alpha_pattern") or {})}
    if odd := [f"{name} {alpha}" for name, alpha in alphas.items() if not 0 < alpha < _HIGHEST_ALPHA]:
        raise UserError(f"{path}: {odd[0]}: alpha must be a number above 0 and below {_HIGHEST_ALPHA:g}")
    check_patterns(settings, where=str(path))
    if not 0 <= (settings.get("lora_dropout") or 0) < 1:
        raise UserError(f"{path}: lora_dropout {settings['lora_dropout']}: must be at least 0 and below 1")
    return settings


def _parts(file: _File, settings: Mapping[str, Any], config: ModelConfig) -> dict[str, list[Part | None]]:
    """Our module -> what PEFT has of each of its projections. Every tensor of the file must find its place."""
    places, ends = {}, []
    for spec in family_of(config.hf_model_type).tensors(config):
        module, _, leaf = spec.name.rpartition(".")
        if leaf == "weight" and module.rsplit(".", 1)[-1] in TARGETS:
            blank = torch.empty(full_shape(spec.name, config), device="meta")
            for index, (hf, piece) in enumerate(zip(spec.hf, spec.layout.split(blank), strict=True)):
                places[hf.removesuffix(".weight")] = (module, index, tuple(piece.shape), len(spec.hf))
        elif leaf == "weight" and isinstance(spec.layout, Vocab):
            ends.append(spec.hf[0].removesuffix(".weight"))
    held = {pair[0]: None for name in file.shapes if (pair := factor_of(name))}
    if not held:
        raise UserError(f"{file.path}: holds no LoRA factors")
    for hf in held:
        if hf not in places:
            raise UserError(f"{file.path}: adapts {hf}, which is not among the linears that can be adapted here "
                            f"({config.hf_model_type}, {config.num_layers} layers)")  # fmt: skip
        if one := [letter for letter in "AB" if factor(hf, letter) not in file.shapes]:
            raise UserError(f"{file.path}: {hf} has only one factor: lora_{one[0]} is missing")
    _check_named(file, held.keys(), list(places), ends, settings)
    parts: dict[str, list[Part | None]] = {}
    for hf in held:
        module, index, (rows, columns), count = places[hf]
        a, b = (file.shapes[factor(hf, letter)] for letter in "AB")
        r = int(_of_pattern(settings.get("rank_pattern"), hf, settings["r"]))
        if a != (r, columns) or b != (rows, r):
            raise UserError(f"{file.path}: {hf} has lora_A {a} and lora_B {b}; {CONFIG} says rank {r} and the "
                            f"base's weight is ({rows}, {columns})")  # fmt: skip
        alpha = float(_of_pattern(settings.get("alpha_pattern"), hf, settings["lora_alpha"]))
        scaling = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
        dtypes = file.dtypes[factor(hf, "A")], file.dtypes[factor(hf, "B")]
        parts.setdefault(module, [None] * count)[index] = Part(hf, r, alpha, scaling, dtypes)
    return parts


def _check_named(
    file: _File, held: Iterable[str], places: Sequence[str], ends: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """That the file adapts what adapter_config.json names, no less and no more.

    Experts are the exception: PEFT adapts them only where transformers keeps each as linears of its own.
    """
    found = set(held)
    if settings.get("target_modules") is None:  # PEFT's default for the model's type, by which it was trained
        settings = {**settings, "target_modules": sorted({hf.rsplit(".", 1)[-1] for hf in found})}
    everything = str(settings["target_modules"]).lower() == "all-linear"
    named = named_by(settings, [*places, *(() if everything else ends)])
    missing = sorted(named - found)
    if not any(".experts." in hf for hf in found):
        missing = [hf for hf in missing if ".experts." not in hf]
    if missing:
        more = f" and {len(missing) - 1} other" if len(missing) > 1 else ""
        raise UserError(f"{file.path}: lacks the factors of {missing[0]}{more}, which {CONFIG} names "
                        "(target_modules and the options beside it)")  # fmt: skip
    if foreign := sorted(found - named):
        raise UserError(f"{file.path}: adapts {foreign[0]}, which {CONFIG} does not name (target_modules and the "
                        "options beside it): the two files are of different adapters")  # fmt: skip


def _replaced(
    path: Path, found: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], config: ModelConfig
) -> dict[str, str]:
    """Global name -> tensor of the file, of what it holds besides factors: embedding, head and norms as a whole."""
    places = {
        f"base_model.model.{spec.hf[0]}": spec
        for spec in family_of(config.hf_model_type).tensors(config)
        if len(spec.hf) == 1 and type(spec.layout) in (Vocab, Replicated)
    }
    replaced = {}
    for name, shape in found.items():
        if name not in places:
            raise UserError(f"{path}: holds {name}, which is no LoRA factor of a linear layer{reason_against(name)}")
        spec = places[name]
        blank = torch.empty(full_shape(spec.name, config), device="meta")
        expected = tuple(spec.layout.split(blank)[0].shape)
        if shape != expected:
            raise UserError(f"{path}: {name} is {shape}, the base's {expected}: a vocabulary that was "
                            "resized cannot be put on it")  # fmt: skip
        if isinstance(spec.layout, Vocab) and not config.untie_embeddings_and_output_weights:
            raise UserError(f"{path}: replaces {name}, whose weights embedding and head share in the base: "
                            "modules_to_save is not supported there")  # fmt: skip
        replaced[spec.name] = name
    for module in settings.get("modules_to_save") or ():
        if not any(f".{name.removesuffix('.weight')}".endswith(f".{module}") for name in found):
            raise UserError(f"{path.with_name(CONFIG)}: modules_to_save {json.dumps(module)} is not supported: its "
                            "weights are not there; embed_tokens, lm_head and norms can be replaced")  # fmt: skip
    return replaced


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches a whole tail of the path, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
