"""Data sets that are read to their end before something is wrong with them, and folders with more than one writer.

Seen in public as huggingface/datasets#8241 (a byte order mark changes what is read) and huggingface/datasets#4661
(jobs that use one folder at a time).
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink_lora.cli.preprocess import preprocessing_parser
from modellink_lora.config.errors import UserError
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.corpus import KEYS, InstructionCorpus, data_file, writing_corpus
from modellink_lora.data.preprocess import run
from modellink_lora.data.records import open_records
from modellink_lora.evaluation.files import csv_rows
from modellink_lora.evaluation.progress import ITEMS, Progress
from modellink_lora.inference.prompt_file import read_conversations, read_prompts
from tests.helpers.tiny import tiny_tokenizer

GOOD = {"instruction": "q", "input": "", "output": "a"}
COLUMNS = list(GOOD)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return str(folder)


def preprocess(path: str, tokenizer: str, prefix: str, **fields: Any) -> int:
    config = PreprocessConfig(
        input=path, output_prefix=prefix, tokenizer_name_or_path=tokenizer,
        handler_name="AlpacaStyleInstructionHandler", prompt_type="empty", **fields,
    )  # fmt: skip
    return run(config, say=lambda line: None).samples


def test_a_bit_of_a_parquet_file_with_checksums_never_changes_a_row(tmp_path: Path) -> None:
    path, rng = tmp_path / "d.parquet", random.Random(0)
    table = pa.table({name: [name + str(i) * 9 for i in range(50)] for name in GOOD})
    pq.write_table(table, path, write_page_checksum=True)
    good = path.read_bytes()
    for _ in range(150):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            records = open_records(str(path))
            found = [record.row for record in records.rows([name for name in COLUMNS if name in records.columns()])]
        except UserError:
            continue
        # the footer, which has no checksum, may name a column otherwise; preprocessing then misses it
        assert found == table.to_pylist() or not found or set(found[0]) != set(COLUMNS)


def test_a_time_zone_that_does_not_exist_drops_its_record(tmp_path: Path) -> None:
    odd = pa.array([1], pa.timestamp("us", "No/Where"))
    pq.write_table(pa.table({"instruction": odd, "output": ["a"]}), tmp_path / "d.parquet")
    (record,) = open_records(str(tmp_path / "d.parquet")).rows(COLUMNS)
    assert record.fault == "instruction holds a value that cannot be read (timestamp[us, tz=No/Where])"


def test_deep_values_reach_workers_only_where_they_are_read(tokenizer: str, tmp_path: Path) -> None:
    deep = '{"instruction": "q", "input": "", "output": "a", "more": ' + "[" * 900 + "]" * 900 + "}"
    (tmp_path / "d.jsonl").write_text(f"{deep}\n" * 2)
    source, prefix = str(tmp_path / "d.jsonl"), str(tmp_path / "a")
    assert preprocess(source, tokenizer, prefix, workers=2) == 2
    with pytest.raises(UserError, match=r"2 x nested too deeply \(the first: .*d\.jsonl line 1\)"):
        preprocess(source, tokenizer, prefix, workers=2, map_keys={"history": "more"})


def test_an_input_whose_name_is_not_unicode_is_read(tokenizer: str, tmp_path: Path) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.jsonl")
    Path(source).write_text(json.dumps(GOOD))
    assert preprocess(source, tokenizer, str(tmp_path / "a")) == 1
    record = InstructionCorpus(str(tmp_path / "a")).sidecar
    assert record is not None and record["input"].endswith("n?.jsonl")


def test_an_empty_name_does_not_mean_the_current_folder() -> None:
    for fields in ({"input": ""}, {"tokenizer_name_or_path": ""}):
        with pytest.raises(UserError, match="is empty: give a file or folder"):
            PreprocessConfig(**{"input": "a", "output_prefix": "b", "tokenizer_name_or_path": "c", **fields})


def test_json_on_the_command_line_may_be_deep_or_long(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[" * 100_000, '{"a": ' + "1" * 5000 + "}"):
        with pytest.raises(SystemExit) as end:
            preprocessing_parser().parse(["--map-keys", text])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "is not JSON that can be read" in error


@pytest.mark.parametrize(
    ("below", "said"), [("file/a", "is below a file, or one itself"), ("file/b/a", "is below a file, or one itself")]
)
def test_output_below_a_file_is_one_line(below: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said), writing_corpus(str(tmp_path / below), {}):
        pass


def test_a_folder_of_an_output_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a_packed_labels_document.bin").mkdir()
    with pytest.raises(UserError, match=r"a_packed_labels_document\.bin: is a folder where a file"):  # noqa: SIM117
        with writing_corpus(str(tmp_path / "a"), {}):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["a_packed_labels_document.bin"]


def test_a_token_that_is_no_int32_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2147483653, which is no int32"), writing_corpus(str(tmp_path / "a"), {}) as to:
        to.add([1, 2**31 + 5], [1, 1], [1, 1])


def foreign(prefix: str, lengths: list[int], tokens: Iterable[float], *, code: int = 4, dtype: str = "<i4") -> str:
    """Files as another program writes them."""
    values, sizes = numpy.asarray(list(tokens), dtype), numpy.asarray(lengths, "<i4")
    offsets = (numpy.cumsum(sizes) - sizes) * values.itemsize
    for key in KEYS:
        data_file(prefix, key, "bin").write_bytes(values.tobytes())
        data_file(prefix, key, "idx").write_bytes(
            b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1) + sizes.tobytes()
            + offsets.astype("<i8").tobytes() + numpy.arange(len(lengths) + 1).astype("<i8").tobytes()
        )  # fmt: skip
    return prefix


def test_sequences_without_a_token_are_refused(tmp_path: Path) -> None:
    assert len(InstructionCorpus(foreign(str(tmp_path / "a"), [2, 1], [5, 6, 7]))) == 2
    with pytest.raises(UserError, match="its sequences are empty or do not lie one after another"):
        InstructionCorpus(foreign(str(tmp_path / "a"), [3, 0], [5, 6, 7]))


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype code 7 are not known"):
        InstructionCorpus(foreign(str(tmp_path / "a"), [2], [5, 6.5], code=7, dtype="<f4"))


SECOND = "import sys; from modellink_lora.data.corpus import writing_corpus\nwith writing_corpus(sys.argv[1], {}): pass"


def test_a_second_writer_of_a_set_is_refused_and_the_first_ends_well(tmp_path: Path) -> None:
    prefix = str(tmp_path / "a")
    second = [sys.executable, "-c", SECOND, prefix]
    with writing_corpus(prefix, {}) as to:
        to.add([1, 2], [1, 1], [1, 2])
        ended = subprocess.run(second, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert "a_packed: another process is writing these files now" in ended.stderr and ended.returncode == 1
        with writing_corpus(str(tmp_path / "b"), {}) as other:  # another set of the same folder
            other.add([1], [1], [1])
    assert InstructionCorpus(prefix)[0][0].tolist() == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (("p.txt", "Hello"), ("p.json", '["Hello"]'), ("p.jsonl", '{"prompt": "Hello"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        read = read_conversations if name == "p.jsonl" else read_prompts
        assert read(tmp_path / name) == ["Hello"]  # type: ignore[operator]


def test_two_columns_of_one_name_in_a_benchmark_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,A,b\n1,2,3\n")
    with pytest.raises(UserError, match="line 1: the header has 'a' twice"):
        csv_rows(tmp_path / "d.csv", ["a", "b"], header=True)


def test_an_item_that_names_no_question_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ITEMS).write_text('{"subject": [1], "number": {}}\n')
    with pytest.raises(UserError, match="line 1: is damaged; give --overwrite"):
        Progress(tmp_path, {})
