"""Finding a benchmark's files in its original folder layout, and reading their rows with the place of every mistake."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.config.document import parse_document
from modellink_lora.config.errors import UserError

csv.field_size_limit(2**27)


@dataclass(frozen=True)
class Row:
    """One row of a file, and where it begins."""

    values: dict[str, Any]
    file: Path
    line: int

    def text(self, key: str) -> str:
        """The text at `key`. Raises UserError when it is missing or no text."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.error(f"{key!r} is {'missing' if value is None else 'no text'}")
        return value

    def error(self, what: str) -> UserError:
        return UserError(f"{self.file} line {self.line}: {what}")


def find_files(folder: Path, ending: str, *, below: Sequence[str], task: str) -> list[Path]:
    """The files that end in `ending`, sorted: in `folder` itself, else in the first of the folders `below` it.

    Raises UserError that says where was looked.
    """
    if not folder.exists():
        raise UserError(f"--task-data-path {folder}: no such folder")
    places = [folder, *(folder / name for name in below)]
    for place in places:
        files = _visible(place, f"*{ending}")
        if files:
            return files
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"--task-data-path {folder}: holds no *{ending} for --task {task} (looked in {looked})")


def split_files(folder: Path, *, task: str) -> tuple[list[Path], list[Path]]:
    """(files of questions, files of worked examples) of a task whose splits are JSON lines files named after them.

    `folder` may also be one file. Test files are preferred to dev files, and those to files named otherwise.
    """
    if folder.is_file():
        return [folder], [path for path in _visible(folder.parent, "*.jsonl") if "train" in path.name]
    below = ("test", "data", "dev")
    try:
        files = find_files(folder, ".jsonl", below=below, task=task)
    except UserError:
        packed = [
            path for place in (folder, *(folder / name for name in below)) for path in _visible(place, "*.jsonl.gz")
        ]
        if not packed:
            raise
        files = sorted(packed)
    shots = [path for path in files if "train" in path.name]
    asked = [path for path in files if "train" not in path.name]
    for split in ("test", "dev", "val"):
        if any(split in path.name for path in asked):
            asked = [path for path in asked if split in path.name]
            break
    if not asked:
        raise UserError(f"--task-data-path {folder}: holds only training files, {', '.join(p.name for p in shots)}")
    beside = asked[0].parent.parent / "train"
    return asked, shots or _visible(beside, "*.jsonl")


def _visible(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder` that match, sorted, without hidden ones such as the `._NAME` of macOS's archives."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith((".", "~")))


def csv_rows(file: Path, columns: Sequence[str], *, header: bool) -> list[Row]:
    """The rows of a CSV file as text by column.

    Args:
        header: the first row names the columns, in any order and case, perhaps with others. Without it the columns
            are those of `columns` in that order; a first row that repeats their names is left out.
    """
    rows: list[Row] = []
    names: list[str] | None = None if header else list(columns)
    for line, cells in _cells(file):
        if names is None:
            names = [cell.strip().lower() for cell in cells]
            missing = [column for column in columns if column not in names]
            if twice := [column for column in columns if names.count(column) > 1]:
                raise UserError(f"{file} line {line}: the header has {twice[0]!r} twice")
            if missing:
                raise UserError(f"{file} line {line}: the header lacks {', '.join(missing)}: {','.join(cells)[:80]}")
            continue
        if not header and line == 1 and [cell.strip().lower() for cell in cells] == names:
            continue
        if len(cells) != len(names):
            raise UserError(f"{file} line {line}: {len(cells)} columns, expected {len(names)}: {','.join(names)}")
        rows.append(Row(dict(zip(names, cells, strict=True)), file, line))
    if not rows:
        raise UserError(f"{file}: holds no rows")
    return rows


def _cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it begins on, cells) of every row; quoted cells may hold line ends."""
    line = 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as source:
            reader = csv.reader(source, strict=True)
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file} line {line}: broken CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def json_rows(files: Sequence[Path]) -> list[Row]:
    """The objects of JSON lines files, one after the other."""
    rows = []
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), start=1):  # not splitlines: it cuts at U+2028 too
            if line.strip():
                rows.append(Row(_object(line, file, number), file, number))
    if not rows:
        raise UserError(f"{', '.join(map(str, files))}: holds no rows")
    return rows


def json_file(file: Path) -> dict[str, Any]:
    """The one object of a JSON file."""
    return _object(read_text(file), file, 1)


def read_text(file: Path) -> str:
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _object(text: str, file: Path, line: int) -> dict[str, Any]:
    return parse_document(text, dict[str, Any], where=f"{file} line {line}")


def train_shots(train: Sequence[Path], wanted: int, *, folder: Path, task: str) -> list[Row]:
    """The first `wanted` rows of a task's train files. Raises UserError when there are none, or fewer."""
    if not wanted:
        return []
    if not train:
        raise UserError(
            f"--task-data-path {folder}: the {wanted} worked examples of {task} come from a train*.jsonl beside the "
            "other files, and there is none: put it there, or give --num-shots 0"
        )
    return first_shots(json_rows(train), wanted, where=train[0])


def first_shots(found: Sequence[Row], wanted: int, *, where: Path) -> list[Row]:
    """The first `wanted` rows. Raises UserError naming both numbers when there are fewer."""
    if wanted > len(found):
        raise UserError(f"--num-shots {wanted}: {where} holds only {len(found)}; give at most that many")
    return list(found[:wanted])
