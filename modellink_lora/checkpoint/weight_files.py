"""Which files of a Hugging Face folder hold its weights, and whether others beside them say something else.

The choice is that of transformers: one file before an index, safetensors before pickle.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from modellink_lora.config.document import read_document
from modellink_lora.config.errors import UserError

_PLAIN = re.compile(r"[\w+-][\w.+-]{0,200}", re.ASCII)  # a name inside the folder
# Files that a loader takes for the weights under some index or none; variants (model.fp16.safetensors) are not.
_TAKEN = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_WHOLE_BYTES, _SAMPLES = 1 << 20, 64  # a tensor up to that size is compared whole, of a larger one that many rows


class WeightFile(Protocol):
    """An opened file of named tensors."""

    def names(self) -> list[str]: ...
    def read(self, name: str) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def weight_files(folder: Path, *, flag: str) -> tuple[list[str], Mapping[str, str]]:
    """Names of the files with the weights, and tensor -> file where an index says so.

    Raises:
        UserError: there are none, or the index is damaged or names files that are not there.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [single], {}
        index = folder / f"{single}.index.json"
        if not index.is_file():
            continue
        weight_map = read_document(index, _Index).weight_map
        if not weight_map:
            raise UserError(f"{index}: weight_map is empty: download the file again")
        names = sorted(set(weight_map.values()))
        if odd := [name for name in names if not _PLAIN.fullmatch(name)]:
            raise UserError(f"{index}: names {odd[0][:100]!r}, which is not the name of a file in the same folder")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{index} names {', '.join(missing)}, which the folder lacks: download it again")
        return names, weight_map
    raise UserError(f"{flag} {folder}: holds no model.safetensors or pytorch_model.bin")


def index_of(name: str) -> str:
    """Name of the index that lists a file of this name."""
    return ("pytorch_model.bin" if name.endswith(".bin") else "model.safetensors") + ".index.json"


def check_rivals(
    folder: Path,
    used: Mapping[str, WeightFile],
    others: list[str],
    *,
    opener: Callable[[Path], WeightFile],
    derived: re.Pattern[str],
) -> None:
    """Compare weight files beside those used with them.

    Args:
        used: tensor -> the file it is read from.
        others: names of the files beside.
        derived: names of tensors that do not matter.
    Raises:
        UserError: a loader could take one of `others` instead and would get another model.
    """
    for name in others:
        if not _TAKEN.fullmatch(name):
            continue
        try:
            file = opener(folder / name)
        except UserError:  # no loader gets anything out of it either
            continue
        held = [key for key in file.names() if not derived.search(key)]
        if what := _difference(file, held, used):
            raise UserError(
                f"{folder}: two sets of weights that differ: {name}, beside the files that are read, {what}: remove "
                f"{name}, or the others and every *.index.json if it is the right one"
            )


def _difference(file: WeightFile, held: list[str], used: Mapping[str, WeightFile]) -> str | None:
    for key in held:
        tensor = file.read(key)
        if key in used:
            if not _same(tensor, used[key].read(key)):
                return f"has another {key}"
        elif not any(other != key and other in used and _same(tensor, file.read(other)) for other in held):
            return f"has {key}, which they lack"  # and which is no copy of a tied embedding
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same, as far as some rows of a large tensor tell."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dim() and a.numel() * a.element_size() > _WHOLE_BYTES:
        rows = torch.linspace(0, len(a) - 1, min(_SAMPLES, len(a))).long()
        a, b = a[rows], b[rows]
    return torch.equal(a, b)
