"""Reading the rows of a data set from local files: parquet, a JSON array, or one JSON object per line."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.config.document import is_deeper, is_unicode
from modellink_lora.config.errors import UserError, printable
from modellink_lora.data.sources import find_sources

Row = dict[str, Any]

NOT_UNICODE = "text is not valid Unicode"
_TOO_DEEP = "nested too deeply"


@dataclass(frozen=True)
class Record:
    """One row and its place in the files; a row that cannot be read is empty, and `fault` says why."""

    where: str  # such as `data/a.jsonl line 7`
    row: Row
    fault: str = ""


@dataclass(frozen=True)
class Records:
    """The rows of one data set, file after file. Made by `open_records`."""

    format: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]  # beside them, but hidden, or of no format that can be read
    notes: tuple[str, ...] = ()  # what was chosen among the files that can be read

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        """The rows with at least these columns, those of a row without one of them left out.

        Raises:
            UserError: a file is damaged or not of its format. A single row that cannot be read is a `Record` with a
                fault.
        """
        for record in itertools.chain.from_iterable(_FORMATS[self.format](file, columns) for file in self.files):
            yield Record(record.where, {}, _TOO_DEEP) if is_deeper(record.row) else record

    def columns(self) -> list[str]:
        """Names of the columns of all rows, in the order in which they first appear.

        A JSON file is read to its end for that: a key may appear in its last row only.

        Raises:
            UserError: as `rows` does, or not one row can be read.
        """
        found: dict[str, None] = {}
        faults: list[Record] = []
        readable = self.format == "parquet"
        for file in self.files:
            if self.format == "parquet":
                found.update(dict.fromkeys(_parquet_columns(file)))
                continue
            for record in _json_records(file):
                found.update(dict.fromkeys(record.row))
                readable |= not record.fault
                if record.fault and not faults:
                    faults.append(record)
        if faults and not readable:
            raise UserError(f"{faults[0].where}: {faults[0].fault}; no record can be read")
        return list(found)


def open_records(path: str) -> Records:
    """The data set at `path`; see `find_sources` for what a folder or a pattern means."""
    sources = find_sources(path)
    return Records(sources.format, sources.files, sources.skipped, sources.notes)


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


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Only what is asked for is read: a value that Python cannot hold does no harm in a column that nobody uses."""
    read = 0
    with _parquet(file) as source:
        names = source.schema_arrow.names
        if twice := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{file}: has two columns called {twice[0]!r}: rename one")
        for batch in source.iter_batches(batch_size=1000, columns=[name for name in columns if name in names]):
            for number, row in enumerate(_batch_rows(batch), start=read):
                where = f"{printable(str(file))} row {number}"
                yield Record(where, {}, row) if isinstance(row, str) else Record(where, row)
            read += len(batch)


def _batch_rows(batch: Any) -> Iterator[Row | str]:
    """The rows of an Arrow batch; of one that holds a value without a form in Python the reason."""
    try:
        rows = batch.to_pylist()
    except Exception:  # text that is not UTF-8, dates beyond the year 9999, unknown time zones
        for number in range(len(batch)):
            yield _row_or_fault(batch.slice(number, 1))
        return
    for row in rows:
        yield {name: _own_fields(value) for name, value in row.items()}


def _row_or_fault(batch: Any) -> Row | str:
    row: Row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _own_fields(column.to_pylist()[0])
        except UnicodeDecodeError:
            return NOT_UNICODE
        except Exception:
            return f"{printable(name)} holds a value that cannot be read ({column.type})"
    return row


def _own_fields(value: Any) -> Any:
    """`value` of an Arrow column without the null fields of its structs, and with its maps as dicts.

    All structs of a column have the fields of every one of them, null where a struct has no such field: a tool would
    be shown with the parameters of all tools.
    """
    if isinstance(value, dict):
        return {name: _own_fields(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        if value and isinstance(value[0], tuple):  # pairs of a map
            return {str(key): _own_fields(item) for key, item in value}
        return [_own_fields(item) for item in value]
    return value


def _json_rows(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a JSON file. What is not asked for is left out: a row may go to another process."""
    for record in _json_records(file):
        row = {name: record.row[name] for name in columns if name in record.row}
        yield Record(record.where, row, record.fault)


def _json_records(file: Path) -> Iterator[Record]:
    """Rows of a JSON array or of JSON lines, whichever the first character says; the ending `.json` names both.

    A byte that is not UTF-8 becomes half of a surrogate pair, which drops the one record whose text holds it.
    """
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as source:
        first = next((char for char in iter(lambda: source.read(1), "") if not char.isspace()), "")
        source.seek(0)
        yield from _array_records(file, source.read()) if first == "[" else _line_records(file, source)


def _line_records(file: Path, lines: Iterator[str]) -> Iterator[Record]:
    name = printable(str(file))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if not is_unicode(line):
                raise UserError(f"{where}: is not UTF-8 text: save the file as UTF-8") from None
            raise UserError(
                f"{where}: broken JSON: {error.msg} (expected one object per line, or an array of objects)"
            ) from None
        except (ValueError, RecursionError) as error:
            yield Record(where, {}, _json_fault(error))
            continue
        if not isinstance(row, dict):
            raise UserError(f"{where}: is not an object")
        yield Record(where, row)


_SPACE = re.compile(r"[ \t\n\r]*")
_BRACKET_OR_TEXT = re.compile(r'[\[\]{}]|"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_decoder = json.JSONDecoder()


def _array_records(file: Path, text: str) -> Iterator[Record]:
    """The elements one by one, so that one that cannot be read does not take the others with it."""
    name = printable(str(file))

    def broken(place: int, message: str) -> UserError:
        if not is_unicode(text[max(place - 1, 0) : place + 1]):
            message = "is not UTF-8 text: save the file as UTF-8"
        return UserError(f"{name} line {text.count(chr(10), 0, place) + 1}: broken JSON: {message}")

    def space(place: int) -> int:
        match = _SPACE.match(text, place)
        assert match is not None
        return match.end()

    place, line, counted, number = space(space(0) + 1), 1, 0, 0
    while number or not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        where = f"{name} line {line}, element {number}"
        if not text.startswith("{", place):
            if re.match(r'["\[\-\w]', text[place : place + 1]):
                raise UserError(f"{name}: element {number} of the array is not an object")
            raise broken(place, "Expecting value")
        try:
            row, end = _decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            end = _end_of_value(text, place)
            if not end:
                raise broken(place, "an object that does not end") from None
            yield Record(where, {}, _json_fault(error))
        else:
            yield Record(where, row)
        place, number = space(end), number + 1
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            raise broken(place, "Expecting ',' delimiter")
        place = space(place + 1)
    if space(place + 1) != len(text):
        raise broken(space(place + 1), "Extra data")


def _end_of_value(text: str, start: int) -> int:
    """The place after the list or object that begins at `start`; 0 where it does not end."""
    depth = 0
    for match in _BRACKET_OR_TEXT.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return 0


def _json_fault(error: Exception) -> str:
    """Why well-formed JSON cannot be read."""
    return _TOO_DEEP if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


_FORMATS: dict[str, Callable[[Path, Sequence[str]], Iterator[Record]]] = {"parquet": _parquet_rows, "json": _json_rows}
