"""Reading the rows of a data set from local files: parquet, a JSON array, or one JSON object per line."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.config.errors import UserError

Row = dict[str, Any]

# a column may be absent from single rows of a JSON file; so many rows decide which columns there are
_ROWS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Records:
    """The rows of one data set, file after file. Made by `open_records`."""

    format: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]  # in the folder, but not of a format that can be read

    def __iter__(self) -> Iterator[Row]:
        return self.rows(self.columns())

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The rows with at least these columns, those of a file without one of them left out."""
        return itertools.chain.from_iterable(_FORMATS[self.format](file, columns) for file in self.files)

    def columns(self) -> list[str]:
        """Names of the columns, in the order they appear in every file, or in the first rows of a JSON file."""
        found: dict[str, None] = {}
        for file in self.files:
            if self.format == "parquet":
                found.update(dict.fromkeys(_parquet_columns(file)))
                continue
            for row in itertools.islice(_json_rows(file), _ROWS_LOOKED_AT):
                found.update(dict.fromkeys(row))
        return list(found)


def open_records(path: str) -> Records:
    """The data set at `path`: a file, a folder (its files, not its subfolders) or a pattern such as `data/*.jsonl`."""
    given, hidden = Path(path), []
    if given.is_file():
        if _format_of(given) is None:
            raise UserError(f"--input {path}: cannot read {given.suffix or 'a file without ending'}; {_READABLE}")
        candidates = [given]
    elif given.is_dir():
        candidates = sorted(given.iterdir())
        hidden = [file for file in candidates if file.name.startswith(".")]
    else:
        candidates = sorted(Path(found) for found in glob.glob(path)) if glob.has_magic(path) else []
        if given.exists():
            raise UserError(f"--input {path}: is neither a file nor a folder")
        if not candidates:
            raise UserError(f"--input {path}: no such file or folder; data sets are not downloaded, give a local path")
    files = [file for file in candidates if file.is_file() and _format_of(file) and file not in hidden]
    if not files:
        raise UserError(f"--input {path}: holds no file that can be read; {_READABLE}")
    formats = sorted({_format_of(file) or "" for file in files})
    if len(formats) > 1:
        raise UserError(
            f"--input {path}: holds files of several formats ({', '.join(file.name for file in files[:12])}"
            f"{', ...' if len(files) > 12 else ''}); choose with a pattern such as '{path.rstrip('/')}/*.{formats[0]}'"
        )
    skipped = tuple(file for file in candidates if file not in files)
    return Records(formats[0], tuple(files), skipped)


def _parquet_columns(file: Path) -> list[str]:
    with _parquet(file) as source:
        return list(source.schema_arrow.names)


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as source:
            yield source
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UserError(f"{file}: is not a readable parquet file: {' '.join(str(error).split())}") from None


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Only what is asked for is read: a value that Python cannot hold does no harm in a column that nobody uses."""
    read = 0
    with _parquet(file) as source:
        names = source.schema_arrow.names
        if twice := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{file}: has two columns called {twice[0]!r}: rename one")
        for batch in source.iter_batches(batch_size=1000, columns=[name for name in columns if name in names]):
            try:
                rows = batch.to_pylist()
            except Exception as error:  # text that is not UTF-8, dates beyond the year 9999, unknown time zones
                raise UserError(f"{file}: rows {read} to {read + len(batch) - 1} hold a value that cannot be read "
                                f"({error}): mend it, or leave its column out with --map-keys") from None  # fmt: skip
            yield from rows
            read += len(batch)


def _json_rows(file: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a JSON array or of JSON lines, whichever the first character says; the ending `.json` names both."""
    try:
        with open(file, encoding="utf-8-sig") as source:
            first = next((char for char in iter(lambda: source.read(1), "") if not char.isspace()), "")
            source.seek(0)
            rows = _array_rows(file, source.read()) if first == "[" else _line_rows(file, source)
            # a row may go to another process: what is not read need not
            yield from ({name: row[name] for name in columns if name in row} for row in rows) if columns else rows
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error})") from None


def _array_rows(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 1,000 deep
        raise UserError(f"{file}: broken JSON: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: element {number} of the array is not an object")
        yield row


def _line_rows(file: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file} line {number}: broken JSON: {error.msg} (expected one object per line, or an array of objects)"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number}: broken JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number}: is not an object")
        yield row


_FORMATS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {"parquet": _parquet_rows, "json": _json_rows}
_ENDINGS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_READABLE = f"{', '.join(_ENDINGS)} files are read"


def _format_of(file: Path) -> str | None:
    return _ENDINGS.get(file.suffix.lower())
