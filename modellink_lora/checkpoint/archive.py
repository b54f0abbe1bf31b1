"""Files of `torch.save`, examined before torch opens them: only what `torch.save` writes, and with the right checksums.

torch.load decides by itself what kind of file it was given, and a TorchScript archive among them runs code of its own.
So the kind is decided here, from the bytes that torch looks at, and everything else is refused unread:

* a zip archive of one folder with `data.pkl`, `data/0`, `data/1`, ... and a few short notes (torch >= 1.6);
* the older format, which begins with the pickle of torch's magic number.
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from modellink_lora.checkpoint.checksums import crc32
from modellink_lora.config.errors import UserError

_ZIP = b"PK\3\4"
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of torch's magic number 0x1950a86a20f9469cfc6c
_RECORD = re.compile(
    r"data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_BLOCK = 8 << 20
_THREADS = 2  # zlib and isal work outside the interpreter's lock


def examine(source: Path | bytes) -> Mapping[str, int] | None:
    """Sizes in bytes of an archive's records by name, `data/0` among them; None for the older format.

    Every record is read once, in blocks, and compared with its CRC-32. Archives written under
    `torch.serialization.set_crc32_options(False)` have none (all are 0) and are taken as they are.

    Raises:
        UserError: it is no file of `torch.save`, or is damaged. The message does not name the file.
    """
    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            head = file.read(len(_OLD_FORMAT))
            if head == _OLD_FORMAT:
                file.seek(0)
                if tarfile.is_tarfile(file) or zipfile.is_zipfile(file):
                    raise UserError("is an archive that begins like a file of torch.save: it is refused unread")
                return None
            if not head.startswith(_ZIP):
                raise UserError("damaged, cut short or not a checkpoint (not a file of torch.save)")
            entries = _entries(file)
            places = [_place(file, entry) for entry in entries]
            _compare(source, entries, places)
    except (OSError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"damaged, cut short or not a checkpoint ({reason})") from None
    if any(entry.CRC for entry in entries):
        _check(source, entries, places)
    return {entry.filename.partition("/")[2]: entry.file_size for entry in entries}


def _entries(file: BinaryIO) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.seek(0, io.SEEK_END)
    names = [entry.filename for entry in entries]
    if any("constants.pkl" in name or "/code/" in name for name in names):
        raise UserError("is a TorchScript archive, which holds code that would run: it is refused unread; "
                        "save the weights alone, by torch.save(model.state_dict(), ...)")  # fmt: skip
    folders = {name.partition("/")[0] for name in names}
    odd = [name for name in names if not _RECORD.fullmatch(name.partition("/")[2])]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if len(folders) != 1 or odd or twice:
        what = f"holds {odd[0]!r}" if odd else f"holds {twice[0]!r} twice" if twice else "has several top folders"
        raise UserError(f"is not a file of torch.save (a zip archive that {what}): it is refused unread")
    if min(entry.header_offset for entry in entries) != 0:
        raise UserError("is not a file of torch.save (a zip archive after something else): it is refused unread")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise UserError(
                f"is not a file of torch.save ({entry.filename} is compressed): pack it without compression"
            )
        if entry.header_offset + entry.file_size > size:
            raise UserError(f"damaged or cut short ({entry.filename} does not fit into the file)")
    return entries


def _place(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Offset of the first byte of a record; its local header must name the same record as the directory."""
    file.seek(entry.header_offset)
    header = file.read(30)
    magic, name_length, extra_length = header[:4], *struct.unpack("<HH", header[26:30])
    if magic != _ZIP or file.read(name_length) != entry.orig_filename.encode():
        raise UserError(f"damaged: the directory of the archive and its records disagree about {entry.filename}")
    return entry.header_offset + 30 + name_length + extra_length


def _compare(source: Path | bytes, entries: list[zipfile.ZipInfo], places: list[int]) -> None:
    """That torch's own reader finds the same records at the same places; archives can be made to differ by reader."""
    reader = torch._C.PyTorchFileReader(str(source) if isinstance(source, Path) else io.BytesIO(source))
    here = {entry.filename.partition("/")[2]: place for entry, place in zip(entries, places, strict=True)}
    theirs = {name: reader.get_record_offset(name) for name in reader.get_all_records()}  # type: ignore[attr-defined]
    if here != theirs:
        raise UserError("is an archive with two directories that differ: it is refused unread")


def _check(source: Path | bytes, entries: list[zipfile.ZipInfo], places: list[int]) -> None:
    def computed(entry: zipfile.ZipInfo, place: int) -> int:
        value, left = 0, entry.file_size
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            file.seek(place)
            while left and (block := file.read(min(left, _BLOCK))):
                value, left = crc32(block, value), left - len(block)
        return -1 if left else value

    with ThreadPoolExecutor(_THREADS) as pool:
        for entry, found in zip(entries, pool.map(computed, entries, places), strict=True):
            if found != entry.CRC:
                raise UserError(
                    f"damaged: {entry.filename} has not the CRC-32 that the archive gives for it; copy the file again"
                )
