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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.checkpoint.peft import CONFIG, TENSORS
from modellink_lora.checkpoint.projections import Part, assemble
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
# Other ways of starting change the base's weights as well.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


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

    def load(part: Part, factor: str) -> Tensor:
        with safe_open(folder / TENSORS, framework="pt") as file:
            return file.get_tensor(f"base_model.model.{part.name}.lora_{factor}.weight")

    whole = {name for name in found if _FACTOR.fullmatch(name) is None}
    replaced = _replaced(folder, {name: found[name] for name in sorted(whole)}, settings, config)
    factors = {name: shape for name, shape in found.items() if name not in whole}
    adapter = assemble(
        folder, _parts(folder, factors, kinds, settings, config), load, settings, config, origin=ORIGIN,
        keep=bool(replaced),
    )  # fmt: skip
    if not replaced:
        return adapter
    reader = adapter.reader
    assert reader is not None

    def read(name: str) -> Tensor:
        if name not in replaced:
            return reader(name)
        with safe_open(folder / TENSORS, framework="pt") as file:
            return file.get_tensor(replaced[name])

    notes = (*adapter.notes, f"{folder}: {', '.join(sorted(replaced))} are taken from it as a whole (modules_to_save)")
    return dataclasses.replace(adapter, notes=notes, replaced=frozenset(replaced), reader=read)


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
        if value and name not in _HARMLESS and name != "modules_to_save":
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
) -> dict[str, list[Part | None]]:
    """Our module -> what PEFT has of each of its projections. Every tensor of the file must find its place."""
    places = {}
    for spec in family_of(config.hf_model_type).tensors(config):
        module, _, leaf = spec.name.rpartition(".")
        if leaf == "weight" and module.rsplit(".", 1)[-1] in TARGETS:
            blank = torch.empty(full_shape(spec.name, config), device="meta")
            for index, (hf, piece) in enumerate(zip(spec.hf, spec.layout.split(blank), strict=True)):
                places[hf.removesuffix(".weight")] = (module, index, tuple(piece.shape), len(spec.hf))
    parts: dict[str, list[Part | None]] = {}
    for name in found:
        match = _FACTOR.fullmatch(name)
        assert match is not None
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
            parts.setdefault(module, [None] * count)[index] = Part(hf, r, alpha, scaling, (dtypes[0], dtypes[1]))
    if not parts:
        raise UserError(f"{folder / TENSORS}: holds no tensors")
    return parts


def _replaced(
    folder: Path, found: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], config: ModelConfig
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
            raise UserError(f"{folder / TENSORS}: holds {name}, which is no LoRA factor of a linear layer{_why(name)}")
        spec = places[name]
        blank = torch.empty(full_shape(spec.name, config), device="meta")
        expected = tuple(spec.layout.split(blank)[0].shape)
        if shape != expected:
            raise UserError(f"{folder / TENSORS}: {name} is {shape}, the base's {expected}: a vocabulary that was "
                            "resized cannot be put on it")  # fmt: skip
        if isinstance(spec.layout, Vocab) and not config.untie_embeddings_and_output_weights:
            raise UserError(f"{folder / TENSORS}: replaces {name}, whose weights embedding and head share in the base: "
                            "modules_to_save is not supported there")  # fmt: skip
        replaced[spec.name] = name
    for module in settings.get("modules_to_save") or ():
        if not any(f".{name.removesuffix('.weight')}".endswith(f".{module}") for name in found):
            raise UserError(f"{folder / CONFIG}: modules_to_save {json.dumps(module)} is not supported: its weights "
                            "are not in the folder; embed_tokens, lm_head and norms can be replaced")  # fmt: skip
    return replaced


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
