"""How PEFT names things: the spellings of tensors in its files, and which linears its settings adapt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from modellink_lora.config.errors import UserError

# DDP and torch.compile put words before the names; a model that PEFT was injected into has none of PEFT's own.
_PREFIX = r"(?:(?:module|_orig_mod)\.)*(?:base_model\.model\.)?"
# The state_dict of a live model has the adapter's name, `default` as a rule, inside the names of its tensors.
_FACTOR = re.compile(_PREFIX + r"(.+?)\.lora_(A|B)(?:\.([^.]+))?\.weight")
_SAVED = re.compile(_PREFIX + r"(.+?)\.modules_to_save\.([^.]+)\.weight")
_PLAIN = re.compile(_PREFIX + r"(.+)")
_REASONS = (
    ("lora_embedding_", "an adapter on embed_tokens is not supported"),
    ("lora_magnitude_vector", "use_dora is not supported"),
    (".lora_B.bias", "lora_bias is not supported"),
    (".base_layer.", "the file is the state_dict of a whole model: save the adapter with its save_pretrained"),
    (".original_module.", "the file is the state_dict of a whole model: save the adapter with its save_pretrained"),
    ("modules_to_save", "modules_to_save is not supported there"),
    (".bias", "trained biases are not supported"),
    (".lora_", "only lora_A and lora_B with one weight each are read"),
    (".weight", "modules_to_save is not supported there"),
)


def factor(hf: str, letter: str) -> str:
    """Name of a factor of the projection `hf` as PEFT's save_pretrained spells it; `letter` is A or B."""
    return f"base_model.model.{hf}.lora_{letter}.weight"


def factor_of(name: str) -> tuple[str, str] | None:
    """(projection, A or B) of a name in any spelling; None if it is no factor."""
    match = _FACTOR.fullmatch(name)
    return (match[1], match[2]) if match else None


def spelled(names: Iterable[str], *, where: str) -> dict[str, str]:
    """Name as save_pretrained spells it -> name in the file.

    Raises UserError where two names mean the same, or the tensors are of several adapters.
    """
    found: dict[str, str] = {}
    adapters = set()
    for name in names:
        if match := _FACTOR.fullmatch(name):
            plain = factor(match[1], match[2])
            adapters.add(match[3])
        elif match := _SAVED.fullmatch(name):
            plain = f"base_model.model.{match[1]}.weight"
        else:
            match = _PLAIN.fullmatch(name)
            plain = f"base_model.model.{match[1]}" if match else name
        if plain in found:
            raise UserError(f"{where}: holds {found[plain]} and {name}, which are the same tensor: remove one")
        found[plain] = name
    if len(adapters) > 1:
        shown = " and ".join(sorted(name or "(without a name)" for name in adapters))
        raise UserError(f"{where}: holds the factors of several adapters, {shown}: save one of them")
    return found


def reason_against(name: str) -> str:
    """Why the tensor `name`, which is no factor of a linear that is read, is not taken."""
    return next((f": {reason}" for mark, reason in _REASONS if mark in name), "")


def check_patterns(settings: Mapping[str, Any], *, where: str) -> None:
    """Raise UserError where a setting that PEFT takes as a regular expression is none."""
    for key in (
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    ):
        value = settings.get(key)
        if key in ("target_modules", "exclude_modules") and not isinstance(value, str):
            continue  # a list of these holds names
        for pattern in [value] if isinstance(value, str) else value or ():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{where}: {key} {pattern!r} is no regular expression ({error})") from None


def named_by(settings: Mapping[str, Any], linears: Iterable[str]) -> set[str]:
    """Those of `linears` that target_modules and the options beside it adapt, by PEFT's rules."""
    return {name for name in linears if _is_named(settings, name)}


def _is_named(settings: Mapping[str, Any], name: str) -> bool:
    exclude, targets = settings.get("exclude_modules"), settings["target_modules"]
    if exclude and (re.fullmatch(exclude, name) if isinstance(exclude, str) else _ends_with(name, exclude)):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in settings.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, name) is not None
    if name in targets:
        return True  # a full path is adapted whatever layers_to_transform says
    return _ends_with(name, targets) and _is_in_layers(settings, name)


def _ends_with(name: str, tails: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{tail}") for tail in tails)


def _is_in_layers(settings: Mapping[str, Any], name: str) -> bool:
    layers, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
    match = next((match for match in found if match), None)
    return match is not None and int(match.group(match.re.groups)) in ([layers] if isinstance(layers, int) else layers)
