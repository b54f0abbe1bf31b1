"""Rows are the same from every format, and a file that cannot be read is named, with the line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from modellink_lora.config.errors import UserError
from modellink_lora.data.records import Row, open_records

ROWS = [
    {"instruction": "I", "history": [["U", "A"]]},
    {"instruction": "é\u2028中", "history": None},
    {"instruction": "", "history": []},
]


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def rows_of(path: Path) -> list[Row]:
    records = open_records(str(path))
    return [record.row for record in records.rows(records.columns())]


def lines(rows: list[dict[str, object]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def test_array_lines_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files = [
        tmp_path / "a.parquet",
        write(tmp_path, "array.json", "\n " + json.dumps(ROWS, indent=1)),
        write(tmp_path, "lines.json", lines(ROWS)),
        write(tmp_path, "lines.jsonl", "\n" + lines(ROWS) + "\n\n"),
        write(tmp_path, "bom.jsonl", "\ufeff" + lines(ROWS)),
    ]
    for file in files:
        records = open_records(str(file))
        assert rows_of(file) == ROWS, file.name
        assert records.columns() == ["instruction", "history"]


def test_a_folder_is_read_in_the_order_of_names_and_lists_what_it_skips(tmp_path: Path) -> None:
    write(tmp_path, "b.json", lines([{"x": 2}]))
    write(tmp_path, "a.jsonl", lines([{"y": 1}]))
    write(tmp_path, "README.md", "")
    (tmp_path / "deeper").mkdir()
    records = open_records(str(tmp_path))
    assert rows_of(tmp_path) == [{"y": 1}, {"x": 2}]
    assert records.columns() == ["y", "x"]
    assert [file.name for file in records.skipped] == ["README.md", "deeper"]


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        write(tmp_path, name, lines([{"x": name}]))
    assert [row["x"] for row in rows_of(tmp_path / "a*.jsonl")] == ["a1.jsonl", "a2.jsonl"]


def test_a_folder_of_several_formats_is_an_error_that_lists_the_files(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    write(tmp_path, "b.json", lines(ROWS))
    with pytest.raises(UserError, match=r"several formats \(a.parquet, b.json\)"):
        open_records(str(tmp_path))


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "no*such.json"])
def test_a_missing_path_is_an_error_and_never_a_download(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_records(str(tmp_path / name))


def test_an_ending_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read \.csv; \.parquet, \.json, \.jsonl files are read"):
        open_records(str(write(tmp_path, "a.csv", "x")))
    with pytest.raises(UserError, match="holds no file that can be read"):
        open_records(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"x": 1}\n\n{"x": \n{"x": 3}', "a.jsonl line 3: broken JSON"),
        ("a.json", '[{"x": 1},\n{"x": }]', "a.json line 2: broken JSON"),
        ("a.json", '{\n"x": 1\n}', "a.json line 1: broken JSON.*one object per line"),
        ("a.jsonl", '{"x": 1}\n"text"', "a.jsonl line 2: is not an object"),
        ("a.json", '[{"x": 1}, 5]', "element 1 of the array is not an object"),
        ("a.json", '[{"x": 1},\n{"x": 2}', "a.json line 2: broken JSON: Expecting ',' delimiter"),
        ("a.json", '[{"x": 1},\n]', "a.json line 2: broken JSON: Expecting value"),
        ("a.json", '[{"x": 1}]\n{"x": 2}', "a.json line 2: broken JSON: Extra data"),
        ("a.json", '[{"x": 1}\n{"x": 2}]', "a.json line 2: broken JSON: Expecting ',' delimiter"),
        (
            "a.json",
            '[{"x": 1},' + '\n{"x": ' + "[" * 100_000,
            "a.json line 2: broken JSON: an object that does not end",
        ),
        ("a.parquet", "text", "a.parquet: is not a readable parquet file"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(write(tmp_path, name, text))


def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"x": "é"}'.encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.jsonl line 1: is not UTF-8"):
        rows_of(tmp_path / "a.jsonl")
