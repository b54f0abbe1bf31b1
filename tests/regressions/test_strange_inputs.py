"""Data files as strangers make them: what is wrong is one line or a dropped record, and the rest is read.

Seen in public as alexa/massive#8: hidden files `._*.jsonl` were read as data and ended in a UnicodeDecodeError.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink_lora.config.errors import UserError
from tests.helpers.preprocessing import preprocess
from tests.helpers.tiny import tiny_tokenizer

GOOD = {"instruction": "q", "input": "", "output": "a"}
COLUMNS = {name: [value] for name, value in GOOD.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return str(folder)


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"\xff\xfe"], pa.binary()).view(pa.string()),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([2**30], pa.date32()),
        pa.array([None], pa.null()),
        pa.array([{"a": 1}]),
    ],
)
def test_a_column_that_nobody_uses_does_no_harm(column: Any, tokenizer: str, tmp_path: Path) -> None:
    summary, said = preprocess(parquet(tmp_path / "d.parquet", **COLUMNS, junk=column), tokenizer)
    assert summary.samples == 1 and "columns not used: junk" in said


def test_text_that_is_not_utf8_in_a_used_column_is_one_line(tokenizer: str, tmp_path: Path) -> None:
    bad = {**COLUMNS, "output": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())}
    with pytest.raises(UserError, match=r"1 x text is not valid Unicode \(the first: .*d\.parquet row 0\)"):
        preprocess(parquet(tmp_path / "d.parquet", **bad), tokenizer)


def test_a_date_among_tools_drops_its_record(tokenizer: str, tmp_path: Path) -> None:
    talk = [[{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]] * 2
    choices = [[datetime.date(2020, 1, 1)], []]
    tools = [[{"name": "f", "parameters": {"properties": {"a": {"type": "string", "enum": c}}}}] for c in choices]
    path = parquet(tmp_path / "d.parquet", conversations=pa.array(talk), tools=pa.array(tools))
    summary, _ = preprocess(path, tokenizer, "Sharegpt", map_keys={"tools": "tools"})
    assert summary.samples == 1 and summary.dropped == {"tools hold a value that JSON has no form for": (1, 0)}


@pytest.mark.parametrize(
    ("text", "kept", "dropped"),
    [
        (r'{"instruction": "q\ud800", "input": "", "output": "a"}', 1, "text is not valid Unicode"),
        (r'{"instruction": "q", "input": "", "output": "\udcff"}', 1, "text is not valid Unicode"),
        (r'{"instruction": "q", "input": "", "output": NaN}', 1, "output is not text"),
        ('{"instruction": "q", "input": "", "output": "a", "\\ud800": 1}', 2, None),
    ],
)
def test_strange_values_drop_their_record(
    text: str, kept: int, dropped: str | None, tokenizer: str, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"instruction": "q", "input": "", "output": "a"}}\n{text}\n')
    summary, said = preprocess(tmp_path / "d.jsonl", tokenizer)
    assert summary.samples == kept and list(summary.dropped) == ([dropped] if dropped else [])
    said.encode()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", '{"instruction": "q"'.encode("utf-16"), "is not UTF-8 text"),
        ("d.jsonl", b"[" * 100_000, "element 0 of the array is not an object"),
        ("d.json", b'[{"a": ' + b"[" * 100_000, "line 1: broken JSON"),
        ("d.json", b"[" + b"1" * 5000 + b"]", "element 0 of the array is not an object"),
        ("d.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "line 1: a number of more than 4,300 digits; no record"),
        ("d.jsonl", b'{"a": 1}\n[1]\n', "line 2: is not an object"),
        ("d.json", b"[[]]", "element 0 of the array is not an object"),
        ("d.parquet", b"PAR1" + b"\0" * 50 + b"PAR1", "is not a readable parquet file"),
        ("d.parquet", b"", "is not a readable parquet file"),
        ("d.json", b"[]", "no column 'instruction'"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_one_line(
    name: str, content: bytes, said: str, tokenizer: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        preprocess(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_two_columns_of_one_name_are_refused(tokenizer: str, tmp_path: Path) -> None:
    arrays, names = [pa.array(["q"])] * 4, ["instruction", "input", "output", "output"]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="two columns called 'output'"):
        preprocess(tmp_path / "d.parquet", tokenizer)


def test_hidden_files_of_a_folder_are_named_and_not_read(tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"instruction": "q", "input": "", "output": "a"}')
    (folder / ".a.jsonl").write_text('{"instruction": "q", "input": "", "output": "b"}')
    (folder / "._a.jsonl").write_bytes(os.urandom(200))
    summary, said = preprocess(folder, tokenizer)
    assert summary.records == 1 and "not read: ._a.jsonl, .a.jsonl, .ipynb_checkpoints" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: os.mkfifo(path), "is neither a file nor a folder"),
        (lambda path: path.symlink_to("nowhere"), "no such file or folder"),
        (lambda path: path.mkdir(), "holds no file that can be read"),
    ],
)
def test_inputs_that_are_no_files_are_one_line(
    make: Callable[[Path], None], said: str, tokenizer: str, tmp_path: Path
) -> None:
    make(tmp_path / "d.json")
    with pytest.raises(UserError, match=said):
        preprocess(tmp_path / "d.json", tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"), ("tokenizer.json", b"[]"), ("tokenizer.json", b'{"model": 5}'),
        ("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}'), ("tokenizer_config.json", b'{"eos_token": 5}'),
        ("tokenizer_config.json", b'{"auto_map": 5}'),
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_one_line_or_loads(name: str, content: bytes, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "d.json").write_text('[{"instruction": "q", "input": "", "output": "a"}]')
    try:
        preprocess(tmp_path / "d.json", str(tmp_path))
    except UserError as error:
        assert "\n" not in str(error)
