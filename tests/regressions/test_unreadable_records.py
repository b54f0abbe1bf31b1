"""One record that cannot be read is dropped with file and line, and the others are kept, whatever is wrong with it.

Reported as huggingface/transformers#8886 (half of a surrogate pair ends the program); the rest was found by fuzzing.
"""

from __future__ import annotations

import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink_lora.config.errors import UserError
from tests.helpers.preprocessing import preprocess
from tests.helpers.tiny import tiny_tokenizer

DEEP, DIGITS = "[" * 100_000 + "]" * 100_000, "1" * 5000
GOOD = '{"instruction": "q", "input": "", "output": "a"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return str(folder)


UNREADABLE: list[tuple[str, str]] = [
    (f'{{"instruction": "q", "input": "", "output": "a", "more": {DEEP}}}', "nested too deeply"),
    (f'{{"instruction": "q", "input": {"[" * 300 + "]" * 300}, "output": "a"}}', "nested too deeply"),
    (f'{{"instruction": "q", "input": "\\"]}}\\\\", "output": {{"a": {DEEP}, "b": "}}]"}}}}', "nested too deeply"),
    (f'{{"instruction": "q", "input": "", "output": {DIGITS}}}', "a number of more than 4,300 digits"),
    (f'{{"instruction": "q", "input": "", "output": "a", "more": [-{DIGITS}]}}', "a number of more than 4,300 digits"),
    ('{"instruction": "cut \\ud83d", "input": "", "output": "a"}', "text is not valid Unicode"),
    ('{"instruction": "q", "input": "", "output": "\\udcff"}', "text is not valid Unicode"),
    ('{"instruction": "q", "input": "\udcff", "output": "a"}', "text is not valid Unicode"),  # a byte that is no UTF-8
    ('{"instruction": "q", "input": "", "output": NaN}', "output is not text"),
    ('{"instruction": "q", "input": {"a": 1}, "output": "a"}', "input is not text"),
]


@pytest.mark.parametrize("number", range(len(UNREADABLE)))
@pytest.mark.parametrize(
    ("name", "form", "place"),
    [
        ("d.jsonl", f"{GOOD}\n\nROW\n{GOOD}\n", "line 3"),
        ("d.json", f" [\n{GOOD},\n ROW ,{GOOD}\n]\n", "line 3, element 1"),
    ],
    ids=["lines", "array"],
)
def test_a_row_is_dropped_with_its_place(
    number: int, name: str, form: str, place: str, tokenizer: str, tmp_path: Path
) -> None:
    row, reason = UNREADABLE[number]
    source = tmp_path / name
    source.write_text(form.replace("ROW", row), errors="surrogateescape")
    summary, said = preprocess(source, tokenizer)
    assert (summary.records, summary.samples, summary.dropped) == (3, 2, {reason: (1, 1)})
    assert f" {reason}; the first is record 1 (counted from 0), {source} {place}" in said
    said.encode()


def test_workers_drop_the_same_records_for_the_same_reasons(tokenizer: str, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text("\n".join([GOOD, *(line for line, _ in UNREADABLE), GOOD]), errors="surrogateescape")
    one, _ = preprocess(source, tokenizer)
    two, _ = preprocess(source, tokenizer, workers=2)
    assert one == two and one.samples == 2 and set(one.dropped) == {reason for _, reason in UNREADABLE}


def test_a_file_of_nothing_else_is_one_line_that_names_the_first(tokenizer: str, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text(f"\n{UNREADABLE[0][0]}\n")
    with pytest.raises(UserError, match=r"d\.jsonl line 2: nested too deeply; no record can be read$"):
        preprocess(source, tokenizer)
    source.write_text("\n".join([UNREADABLE[5][0]] * 3))
    with pytest.raises(UserError, match=r"of 3 records: 3 x text is not .* \(the first: .*d\.jsonl line 1\)$"):
        preprocess(source, tokenizer)
    assert not list((tmp_path / "out").glob("*.bin"))


ODD: list[tuple[Any, str]] = [
    (pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string()), "text is not valid Unicode"),
    (pa.array([b"a", b"b"], pa.binary()), "output is not text"),
    (pa.array([1, 2**62], pa.timestamp("us")), "output holds a value that cannot be read (timestamp[us])"),
    (pa.array([1, 2**30], pa.date32()), "output holds a value that cannot be read (date32[day])"),
    (pa.array([decimal.Decimal("1.5"), decimal.Decimal("2")]), "output is not text"),
    (pa.array([float("nan"), 1.0]), "output is not text"),
    (pa.array([[1], [2]]), "several answers in one record"),
    (pa.array([{"a": [{"b": 1}]}, {"a": []}]), "output is not text"),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_a_row_of_parquet_is_dropped_with_its_number(number: int, tokenizer: str, tmp_path: Path) -> None:
    column, reason = ODD[number]
    source = tmp_path / "d"
    source.mkdir()
    pq.write_table(pa.table({"instruction": ["q"] * 3, "input": [""] * 3, "output": ["a"] * 3}), source / "a.parquet")
    pq.write_table(pa.table({"instruction": ["q"] * 2, "input": [""] * 2, "output": column}), source / "b.parquet")
    summary, said = preprocess(source, tokenizer)
    assert summary.samples == 5 - sum(count for count, _ in summary.dropped.values()) == (4 if number == 0 else 3)
    first = summary.dropped[reason][1]
    assert f"{reason}; the first is record {first} (counted from 0), {source}/b.parquet row {first - 3}" in said


def test_texts_that_parquet_keeps_otherwise_are_read(tokenizer: str, tmp_path: Path) -> None:
    for column in (pa.array(["a"]).dictionary_encode(), pa.array(["a"], pa.large_string())):
        pq.write_table(pa.table({"instruction": column, "input": column, "output": column}), tmp_path / "d.parquet")
        assert preprocess(tmp_path / "d.parquet", tokenizer)[0].samples == 1


def test_deep_values_of_every_key_of_a_conversation_drop_their_record(tokenizer: str, tmp_path: Path) -> None:
    talk = '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'
    good, deep = f'{{"conversations": {talk}}}', "[" * 800 + "]" * 800
    rows = [
        good,
        talk.replace('"human"', deep), talk.replace('"a"', deep), talk.replace('"a"', f'"a", "tool_calls": {deep}'),
        talk.replace('"a"', f'"a", "weight": {deep}'),
    ]  # fmt: skip
    tools = [f'[{{"name": "f", "parameters": {{"properties": {{"p": {{"type": {deep}}}}}}}}}]', json.dumps(deep)]
    lines = [rows[0], *(f'{{"conversations": {row}}}' for row in rows[1:])]
    lines += [f'{{"conversations": {talk}, "tools": {value}}}' for value in tools]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    summary, _ = preprocess(tmp_path / "d.jsonl", tokenizer, "Sharegpt", map_keys={"tools": "tools"})
    assert summary.samples == 1
    assert summary.dropped == {"nested too deeply": (5, 1), "tools are nested too deeply": (1, 6)}
