"""CRC-32 of bytes and files, by Intel's isal where it is installed (several times as fast as zlib, same value)."""

from __future__ import annotations

from pathlib import Path

try:
    from isal.isal_zlib import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

_BLOCK = 8 << 20


def crc32(data: bytes | memoryview, value: int = 0) -> int:
    """CRC-32 of `data` (the polynomial of zip and gzip), continuing from `value`, that of the bytes before it."""
    return _crc32(data, value)


def crc32_of_file(path: Path) -> int:
    """CRC-32 of the content of `path`, read in blocks. Raises OSError."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = crc32(block, value)
    return value
