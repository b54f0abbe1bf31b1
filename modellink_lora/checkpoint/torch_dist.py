"""Folders that megatron-core's dist_checkpointing writes (torch_dist): `.metadata`, `*.distcp`, `common.pt`.

Since 0.19 what `common.pt` held is an object among the tensors in `*.distcp`.

Read without a process group and without running what is pickled in them. This file knows where bytes lie and gives
named tensors of full shape, whatever the layout that wrote them; `megatron_dist.py` knows what the names mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.pickle_limits import text
from modellink_lora.checkpoint.unpickle import Inert, RestrictedUnpickler, load, load_common_state, load_rank_file
from modellink_lora.config.errors import UserError

METADATA, COMMON = ".metadata", "common.pt"
_COMMON_STATE = "common_state/shard_0_1"  # the object's name: the only shard of one


class _Record(Inert):
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
        if module.startswith("torch.distributed.") or name == "MCoreMetadata":  # megatron-core 0.15 adds a field to it
            return _Record
        if (module, name) == ("torch.serialization", "_get_layout"):
            return text
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
    common: Chunk | None  # the object that took the place of common.pt

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The full tensor `name`, or row `row` of its first dimension."""
        entry = self.entries[name]
        first = 0 if row is None else row
        count = entry.shape[0] if row is None and entry.shape else 1
        result = torch.empty((count, *entry.shape[1:]) if entry.shape else (), dtype=entry.dtype)
        covered, used = 0, []
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
            used.append(chunk)
        if twice := _overlap(used):
            raise UserError(f"{self.folder}: the pieces of {name} at {twice[0].offsets} and {twice[1].offsets} overlap")
        if covered != result.numel():
            raise UserError(f"{self.folder}: the pieces of {name} cover {covered} of its {result.numel()} numbers")
        return result if row is None else result[0]

    def load_common(self) -> dict[str, Any]:
        """What the writer kept beside its tensors, args and iteration among it; empty if there is nothing."""
        path = self.folder / COMMON
        if self.common is None:
            return load_rank_file(path) if path.is_file() else {}
        return load_common_state(self._bytes(self.common), self.folder / self.common.file)

    def _bytes(self, chunk: Chunk) -> bytes:
        path = self.folder / chunk.file
        if not path.is_file():
            raise UserError(f"{path} is missing: {METADATA} names it")
        if not 0 <= chunk.start <= chunk.start + chunk.length <= path.stat().st_size:
            raise UserError(f"{path}: cut short: {METADATA} says that it holds {chunk.length} bytes at {chunk.start}")
        with path.open("rb") as file:
            file.seek(chunk.start)
            return file.read(chunk.length)

    def load(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """One piece as it was written."""
        path = self.folder / chunk.file
        found = load(self._bytes(chunk), where=str(path))
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
        common = _piece(_COMMON_STATE, (), (), storage) if (_COMMON_STATE, ()) in storage else None
        dropped = {_kind(name): "not a weight" for name, found in described
                   if not _is_weight(name, found) and name != _COMMON_STATE}  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # pickle raises a dozen types for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, cut short or of an unknown version ({reason})") from None
    if not entries:
        raise UserError(f"{path}: describes no weights")
    return TorchDist(folder, entries, dropped, common)


def _is_weight(name: str, found: Any) -> bool:
    """Optimizer states are larger than the weights, and named after them."""
    return hasattr(found, "chunks") and not name.startswith(("optimizer", "chained_", "rng_state", "rerun_"))


def _kind(name: str) -> str:
    """`*._extra_state`, `optimizer.*`"""
    last = name.split("/")[0].rsplit(".", 1)[-1]
    return "*._extra_state" if last == "_extra_state" else name.split(".")[0].split("/")[0] + ".*"


def _key(index: Any) -> tuple[str, tuple[int, ...]]:
    return index.fqn, _numbers(getattr(index, "offset", None) or ())


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise UserError(f"gives a {type(values).__name__} where the sizes or offsets of a tensor belong")
    return tuple(int(value) for value in values)


def _entry(name: str, found: Any, storage: Mapping[tuple[str, tuple[int, ...]], Any]) -> Entry:
    dtype = next((x for x in _state(found.properties) if isinstance(x, torch.dtype)), None)
    if dtype is None:
        raise UserError(f"says no dtype for {name}")
    chunks = tuple(_piece(name, _numbers(piece.offsets), _numbers(piece.sizes), storage) for piece in found.chunks)
    shape = _numbers(found.size)
    if odd := [chunk for chunk in chunks if not _lies_inside(chunk, shape)]:
        raise UserError(f"says that {name} has the shape {shape}, and a piece {odd[0].sizes} at {odd[0].offsets}")
    if all(chunk.offsets for chunk in chunks):
        covered, full = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
        if covered != full or 0 in shape:
            raise UserError(f"says that the pieces of {name} {shape} cover {covered} of its {full} numbers")
    return Entry(shape, dtype, chunks)


def _lies_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not chunk.offsets:
        return True
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    return all(0 <= first <= first + size <= limit for first, size, limit in zip(chunk.offsets, chunk.sizes, shape))


def _overlap(chunks: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two pieces that hold the same element, if there are any."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    for place, one in enumerate(ordered):
        for other in itertools.islice(ordered, place + 1, None):
            if other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break  # so do all that follow
            if all(a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes)):
                return one, other
    return None


def _piece(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], storage: Mapping[Any, Any]) -> Chunk:
    info = storage.get((name, offsets)) or storage.get((name, ()))
    if info is None:
        raise UserError(f"does not say where the piece of {name} at {list(offsets)} is stored")
    if Path(info.relative_path).name != info.relative_path or getattr(info, "transform_descriptors", None):
        raise UserError(f"stores {name} in a way that is not read ({info.relative_path})")
    return Chunk(offsets, sizes, info.relative_path, int(info.offset), int(info.length))


def _state(record: Any) -> Sequence[Any]:
    return [*record.values, *record.__dict__.values()] if hasattr(record, "values") else list(record.__dict__.values())
