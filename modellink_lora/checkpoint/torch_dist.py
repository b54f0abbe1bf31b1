"""Folders that megatron-core's dist_checkpointing writes (torch_dist): `.metadata`, `*.distcp`, `common.pt`.

Read without a process group and without running what is pickled in them. This file knows where bytes lie and gives
named tensors of full shape, whatever the layout that wrote them; `megatron_dist.py` knows what the names mean.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.unpickle import RestrictedUnpickler
from modellink_lora.config.errors import UserError

METADATA = ".metadata"


class _Record:
    """Stands in for every class of torch.distributed: keeps what was stored and does nothing.

    The classes differ between versions of torch, and some describe the writer's plan, which is of no use here.
    """

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = tuple(state)


class _MetadataUnpickler(RestrictedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed."):
            return _Record
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        return super().find_class(module, name)


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor: where it belongs and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """One stored tensor of full shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TorchDist:
    """An opened folder. Tensors stay on disk until read."""

    folder: Path
    entries: Mapping[str, Entry]
    dropped: Mapping[str, str]  # what else is there -> why it is not used

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The full tensor `name`, or row `row` of its first dimension."""
        entry = self.entries[name]
        first = 0 if row is None else row
        count = entry.shape[0] if row is None and entry.shape else 1
        result = torch.empty((count, *entry.shape[1:]) if entry.shape else (), dtype=entry.dtype)
        covered = 0
        for chunk in entry.chunks:
            if not chunk.offsets:
                return self.load(chunk, entry.dtype)
            low, high = max(chunk.offsets[0], first), min(chunk.offsets[0] + chunk.sizes[0], first + count)
            if low >= high:
                continue
            piece = self.load(chunk, entry.dtype).narrow(0, low - chunk.offsets[0], high - low)
            place = result.narrow(0, low - first, high - low)
            for dim, (offset, size) in enumerate(zip(chunk.offsets[1:], chunk.sizes[1:], strict=True), start=1):
                place = place.narrow(dim, offset, size)
            place.copy_(piece)
            covered += piece.numel()
        if covered != result.numel():
            raise UserError(f"{self.folder}: the pieces of {name} cover {covered} of its {result.numel()} numbers")
        return result if row is None else result[0]

    def load(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """One piece as it was written."""
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                found = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {METADATA} names it") from None
        except Exception as error:  # torch raises a dozen types for a bad file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path}: damaged or cut short ({reason})") from None
        if not isinstance(found, Tensor) or tuple(found.shape) != chunk.sizes or found.dtype != dtype:
            raise UserError(f"{path}: holds something else at byte {chunk.start} than {METADATA} says")
        return found.detach()


def is_torch_dist(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def open_torch_dist(folder: Path) -> TorchDist:
    """Read `.metadata` of `folder`.

    Raises:
        UserError: it is damaged, contains anything but the description of tensors, or describes flattened ones.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            document = _MetadataUnpickler(file).load()
        storage = {_key(index): info for index, info in document.storage_data.items()}
        described = document.state_dict_metadata.items()
        entries = {name: _entry(name, found, storage) for name, found in described if _is_weight(name, found)}
        dropped = {_kind(name): "not a weight" for name, found in described if not _is_weight(name, found)}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # pickle raises a dozen types for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, cut short or of an unknown version ({reason})") from None
    if not entries:
        raise UserError(f"{path}: describes no weights")
    return TorchDist(folder, entries, dropped)


def _is_weight(name: str, found: Any) -> bool:
    """Optimizer states are larger than the weights, and named after them."""
    return hasattr(found, "chunks") and not name.startswith(("optimizer", "chained_", "rng_state", "rerun_"))


def _kind(name: str) -> str:
    """`*._extra_state`, `optimizer.*`"""
    last = name.split("/")[0].rsplit(".", 1)[-1]
    return "*._extra_state" if last == "_extra_state" else name.split(".")[0].split("/")[0] + ".*"


def _key(index: Any) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(getattr(index, "offset", None) or ())


def _entry(name: str, found: Any, storage: Mapping[tuple[str, tuple[int, ...]], Any]) -> Entry:
    dtype = next((x for x in _state(found.properties) if isinstance(x, torch.dtype)), None)
    if dtype is None:
        raise UserError(f"says no dtype for {name}")
    chunks = []
    for piece in found.chunks:
        offsets, sizes = tuple(piece.offsets), tuple(piece.sizes)
        info = storage.get((name, offsets)) or storage.get((name, ()))
        if info is None:
            raise UserError(f"does not say where the piece of {name} at {list(offsets)} is stored")
        if "/" in info.relative_path or getattr(info, "transform_descriptors", None):
            raise UserError(f"stores {name} in a way that is not read ({info.relative_path})")
        chunks.append(Chunk(offsets, sizes, info.relative_path, int(info.offset), int(info.length)))
    return Entry(tuple(found.size), dtype, tuple(chunks))


def _state(record: Any) -> Sequence[Any]:
    return [*record.values, *record.__dict__.values()] if hasattr(record, "values") else list(record.__dict__.values())
