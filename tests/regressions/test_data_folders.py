"""Which files of a folder are data, which of them are for training, and where the columns of a data set are looked for.

Reported as benchopt/benchopt#625 (`._NAME` files of macOS), huggingface/datasets#3221 (splits by the names of files),
huggingface/datasets#5772 and #7170 (keys that the first rows lack).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.handlers import reader_for
from modellink_lora.data.preprocess import run
from modellink_lora.data.prompt import Conversation
from modellink_lora.data.records import open_records
from modellink_lora.evaluation.files import split_files
from tests.helpers.tiny import tiny_tokenizer


def fill(folder: Path, *names: str) -> Path:
    """Files of one record each, which holds the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"x": [name]}), path)
        else:
            path.write_text(json.dumps({"x": name}))
    return folder


def read(path: Path) -> list[str]:
    return [record.row["x"] for record in open_records(str(path)).rows(["x"])]


HIDDEN = (
    ".a.jsonl", "._a.jsonl", ".cache/huggingface/b.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "~$a.jsonl",
    ".gitattributes", "a.jsonl~", "#a.jsonl#", ".a.jsonl.swp", "__MACOSX/._a.jsonl", "dataset_info.json",
    "dataset_infos.json", "README.md",
)  # fmt: skip


def test_hidden_files_and_files_about_the_data_are_no_data(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", *HIDDEN)
    assert read(tmp_path) == ["a.jsonl"]
    assert {path.name for path in open_records(str(tmp_path)).skipped} == {Path(name).parts[0] for name in HIDDEN}
    assert read(tmp_path / "*.jsonl") == ["a.jsonl"]
    assert read(tmp_path / ".a.jsonl") == [".a.jsonl"]  # what is named is meant


def test_a_folder_of_hidden_files_alone_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file that can be read"):
        open_records(str(fill(tmp_path, *HIDDEN)))


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
          "data/test-00000-of-00001.parquet", "data/validation-00000-of-00001-a09b74b3ef9c3b56.parquet", "README.md",
          ".gitattributes", "dataset_infos.json"),
         ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")),
        (("train.jsonl", "test.jsonl", "valid.jsonl", "dev.jsonl", "eval.jsonl"), ("train.jsonl",)),
        (("gsm8k_train_300.jsonl", "gsm8k_test_200.jsonl"), ("gsm8k_train_300.jsonl",)),
        (("alpaca.jsonl", "alpaca_val.jsonl"), ("alpaca.jsonl",)),
        (("alpaca.jsonl", "alpaca_eval_v2.json"), ("alpaca.jsonl",)),
        (("train.jsonl", "more.jsonl"), ("more.jsonl", "train.jsonl")),
        (("test.jsonl",), ("test.jsonl",)),
        (("contest.jsonl", "latest.jsonl", "trained.jsonl"), ("contest.jsonl", "latest.jsonl", "trained.jsonl")),
        (("train_on_tests.jsonl", "train_test.jsonl"), ("train_on_tests.jsonl", "train_test.jsonl")),
        (("data/train/0000.parquet", "data/test/0000.parquet"), ("data/train/0000.parquet",)),
        (("test/a.jsonl", "train/a.jsonl", "train/.b.jsonl", ".cache/train/c.jsonl"), ("train/a.jsonl",)),
        (("train.parquet", "test.jsonl"), ("train.parquet",)),
    ],
)  # fmt: skip
def test_of_a_folder_the_training_files_are_read(
    names: tuple[str, ...], train: tuple[str, ...], tmp_path: Path
) -> None:
    assert read(fill(tmp_path, *names)) == list(train)


def test_what_was_chosen_is_told_and_a_pattern_reads_all(tmp_path: Path) -> None:
    folder = fill(tmp_path / "test", "data/train-0.parquet", "data/test-0.parquet")
    records = open_records(str(folder))
    assert records.notes == (
        f"{folder} itself holds no file that can be read: reading {folder}/data",
        "not read, since by their names they are test or validation files: test-0.parquet "
        f"(a pattern reads all that it matches, such as '{folder}/data/*.parquet')",
    )
    pattern = open_records(f"{folder}/data/*.parquet")
    assert [path.name for path in pattern.files] == ["test-0.parquet", "train-0.parquet"]
    assert pattern.notes == ("among the files are test or validation files, by their names: test-0.parquet",)
    assert open_records(str(fill(tmp_path / "t", "dev.jsonl"))).notes == (
        "all files are test or validation files by their names",
    )


def test_several_folders_of_data_are_several_data_sets(tmp_path: Path) -> None:
    fill(tmp_path, "main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet")
    with pytest.raises(UserError, match=rf"2 folders below it do: give one of them, such as {tmp_path}/main$"):
        open_records(str(tmp_path))
    assert read(tmp_path / "main") == ["main/train-0.parquet"]


def test_hidden_files_are_no_benchmark(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl", "._test.jsonl", "train/a.jsonl", "train/._a.jsonl", "._train.jsonl")
    assert [path.name for path in split_files(tmp_path, task="gsm8k")[0]] == ["test.jsonl"]
    assert split_files(tmp_path / "test.jsonl", task="gsm8k") == ([tmp_path / "test.jsonl"], [])
    fill(tmp_path / "gsm8k", "test/a.jsonl", "train/a.jsonl", "train/._a.jsonl")
    assert split_files(tmp_path / "gsm8k", task="gsm8k")[1] == [tmp_path / "gsm8k/train/a.jsonl"]


LATE: dict[str, Any] = {"system": "s", "history": [["q0", "a0"]]}


@pytest.mark.parametrize("kind", ["jsonl", "json", "files", "parquet"])
def test_a_column_of_the_last_row_only_is_read(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": "q", "input": "", "output": "a"} for _ in range(1500)]
    late = {**rows[0], **LATE}
    if kind == "jsonl":
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, [*rows, late])))
    elif kind == "json":
        (tmp_path / "d.json").write_text(json.dumps([*rows, late]))
    elif kind == "files":
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "b.jsonl").write_text(json.dumps(late))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        pq.write_table(pa.Table.from_pylist([late]), tmp_path / "b.parquet")
    records = open_records(str(tmp_path))
    assert records.columns() == ["instruction", "input", "output", "system", "history"]
    reader = reader_for("AlpacaStyleInstructionHandler", {name: name for name in LATE}, records.columns())
    *_, first, last = (reader.read(record.row) for record in records.rows(reader.columns))
    assert isinstance(first, Conversation) and len(first.messages) == 2
    assert isinstance(last, Conversation) and len(last.messages) == 4 and last.system == "s"


def test_a_late_column_that_is_not_used_is_named(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows: list[dict[str, Any]] = [{"conversations": talk}] * 1200
    rows.append({"conversations": [*talk[:1], {**talk[1], "thought": "t"}], "tools": "[]"})
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny_tokenizer(tmp_path)
    said: list[str] = []
    config = PreprocessConfig(
        input=str(tmp_path / "d.jsonl"), output_prefix=str(tmp_path / "a"), tokenizer_name_or_path=str(tmp_path),
        handler_name="SharegptStyleInstructionHandler", prompt_type="empty",
    )  # fmt: skip
    run(config, say=said.append)
    assert "columns not used: tools (--map-keys gives a column a meaning)" in said
    assert "keys of messages not used: thought" in said
