"""An output file whose tensors all have their place before any of them is known, filled from several threads.

Blocks are written where they belong as soon as they exist (`pwrite`): no tensor, let alone a file, is ever held. Not
through a mapping, although that would look simpler: on a full disk a mapping ends the process by a signal, writing
raises an error that can be told; and the page of a mapping costs a fault each, a write of a megabyte one call.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modellink_lora.checkpoint.checksums import crc32
from modellink_lora.config.errors import UserError

_FLUSH_BYTES = 64 << 20  # written since the last flush, after which the disk is given something to do


@dataclass(frozen=True)
class Slot:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class OutFile:
    """A file of `size` bytes, of which the tensors lie at `offsets` (name -> byte); use it as a context."""

    def __init__(self, path: Path, slots: Iterable[Slot], offsets: Mapping[str, int], *, checksums: bool) -> None:
        self.path = path
        self.slots = {slot.name: slot for slot in slots}
        self.crc32: dict[str, int] = {}  # of each tensor written, where `checksums` asks for them
        self._offsets = offsets
        self._checksums = checksums
        self._descriptor = os.open(path, os.O_RDWR)
        self._written: set[str] = set()
        self._dirty = 0
        self._flushing = threading.Lock()

    def __enter__(self) -> OutFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def write(self, name: str, blocks: Iterable[Tensor], *, also: Sequence[OutFile] = ()) -> int:
        """Fill the place of `name` with consecutive blocks of its rows; returns the bytes written.

        Any thread may call it, each tensor once.

        Args:
            also: files that hold the same tensor under the same name, filled together with this one.
        """
        slot = self.slots[name]
        for file in (self, *also):
            assert name not in file._written, f"{name} was written twice"
            file._written.add(name)
        done, crc = 0, 0
        for block in blocks:
            assert block.dtype == slot.dtype, (name, block.dtype, slot.dtype)
            data = memory_of(block)
            assert done + len(data) <= slot.nbytes, f"{name}: more rows than {slot.shape}"
            if self._checksums:
                crc = crc32(data, crc)
            for file in (self, *also):
                file._put(data, file._offsets[name] + done)
            done += len(data)
        assert done == slot.nbytes, f"{name}: {done} bytes instead of {slot.nbytes}"
        for file in (self, *also):
            if file._checksums:
                file.crc32[name] = crc
        return done

    def patch(self, data: bytes, offset: int) -> None:
        """Overwrite bytes that belong to no tensor."""
        self._put(memoryview(data), offset)

    def finish(self) -> None:
        """Check that every tensor has been written, and wait for the disk."""
        assert not (missing := sorted(self.slots.keys() - self._written)), f"never written: {missing[:3]}"
        self._flush()

    def _put(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count
                self._dirty += count
        except OSError as error:
            raise _explained(error, self.path) from None
        # one thread waits for the disk while the others go on: the disk works from the start, not after the last byte
        if self._dirty >= _FLUSH_BYTES and self._flushing.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._flushing.release()

    def _flush(self) -> None:
        self._dirty = 0
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise _explained(error, self.path) from None


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _explained(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{path}: {error.strerror} while writing; nothing is left of the result: free some space")
    return error
