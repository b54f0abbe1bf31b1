"""A file as `torch.save` makes it, laid out with room for its tensors and filled later.

torch itself writes the archive, from tensors whose memory nobody touches, so that they have addresses and no pages.
This file finds the room it leaves and, at the end, puts the checksums in, so that the result is what `torch.save` would
have made of the filled tensors.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink_lora.checkpoint.outfile import OutFile, Slot


def torch_file(path: Path, document: Any, tensors: Sequence[tuple[str, Tensor]]) -> OutFile:
    """The file of `document` with everything in it but the values of its tensors.

    Args:
        tensors: (name they are filled by, `torch.empty` of their size) in the order in which pickling meets them.
    """
    with torch.serialization.skip_data():
        torch.save(document, path)
    slots = [Slot(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    rooms = _rooms(path)  # storages are numbered in the order of pickling
    assert [room.file_size for room, _ in rooms] == [slot.nbytes for slot in slots], f"{path}: unexpected archive"
    offsets = {slot.name: offset for slot, (_, offset) in zip(slots, rooms, strict=True)}
    return OutFile(path, slots, offsets, checksums=True)


def put_checksums(file: OutFile) -> None:
    """CRC-32 of every storage into the two places where a zip archive keeps it; the last thing before `finish`."""
    rooms = _rooms(file.path)
    with zipfile.ZipFile(file.path) as archive:
        position, order = archive.start_dir, [entry.header_offset for entry in archive.infolist()]
    crcs = {
        entry.header_offset: (file.crc32[name], offset + entry.file_size)
        for name, (entry, offset) in zip(file.slots, rooms, strict=True)
    }
    with file.path.open("rb") as read:
        for header_offset in order:  # the central directory lists the entries in the same order
            read.seek(position)
            entry = read.read(46)
            assert entry[:4] == b"PK\1\2", f"{file.path}: unexpected archive"
            if header_offset in crcs:
                crc, end = crcs[header_offset]
                file.patch(struct.pack("<I", crc), position + 16)
                read.seek(end)
                assert read.read(4) == b"PK\7\x08", f"{file.path}: unexpected archive"  # the data descriptor
                file.patch(struct.pack("<I", crc), end + 4)
            position += 46 + sum(struct.unpack("<HHH", entry[28:34]))


def _rooms(path: Path) -> list[tuple[zipfile.ZipInfo, int]]:
    """Entry of every storage of a torch archive, in order of their numbers, and the offset of its first byte."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        found = []
        for entry in archive.infolist():
            head, _, number = entry.filename.rpartition("/")
            if number.isdigit() and head.count("/") == 1 and head.endswith("/data"):
                file.seek(entry.header_offset + 26)
                lengths = sum(struct.unpack("<HH", file.read(4)))  # of name and extra field of the local header
                found.append((int(number), entry, entry.header_offset + 30 + lengths))
    return [(entry, offset) for _, entry, offset in sorted(found, key=lambda item: item[0])]
