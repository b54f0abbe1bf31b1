"""CRC-32 of bytes and files, by Intel's isal where it is installed (several times as fast as zlib, same value).

A JSON document that describes other files holds theirs and its own under the key `crc32`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modellink_lora.config.document import typed
from modellink_lora.config.errors import UserError

try:
    from isal.isal_zlib import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

_BLOCK = 8 << 20
KEY, OWN = "crc32", "this document"


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


def with_checksums(document: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """`document` with the key `crc32`: name of a file -> CRC-32 of its content, and that of the document itself."""
    sums = {name: crc32_of_file(path) for name, path in files.items()}
    return {**document, KEY: {**sums, OWN: _of_document({**document, KEY: sums})}}


def check_document(document: Mapping[str, Any], *, where: Path) -> dict[str, int]:
    """File name -> CRC-32, as `document` of the file `where` says; empty where it was written without.

    Raises UserError when the document is not what was written.
    """
    if KEY not in document:
        return {}
    sums = dict(typed(document[KEY], dict[str, int], where=f"{where}: {KEY}"))
    if sums.pop(OWN, None) != _of_document({**document, KEY: sums}):
        raise UserError(f"{where}: damaged or changed by hand (its CRC-32 differs): copy it again; "
                        f"a change that is meant needs the key {KEY} removed")  # fmt: skip
    return sums


def check_file(path: Path, sums: Mapping[str, int], *, name: str | None = None) -> None:
    """Raise UserError when the content of `path`, in `sums` by its own name or `name`, is not what they say of it."""
    name = name or path.name
    if name in sums and crc32_of_file(path) != sums[name]:
        raise UserError(f"{path}: damaged (its CRC-32 differs from the one kept beside it): copy it again, or take "
                        "another one")  # fmt: skip


def _of_document(document: Mapping[str, Any]) -> int:
    """CRC-32 of a canonical spelling, which spaces, line ends and the order of keys do not change."""
    return crc32(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
