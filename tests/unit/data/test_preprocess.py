"""The preprocessing job from its command line to its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.cli.preprocess import ACCEPTED, REFUSED, main
from modellink_lora.config.errors import UserError
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.corpus import InstructionCorpus
from modellink_lora.data.preprocess import Summary, run
from modellink_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from tests.helpers.shared import shared
from tests.helpers.tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
ROWS: list[dict[str, Any]] = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Add", "input": "2 and 3", "output": ""},
    {"instruction": "中文 é", "input": "x", "output": "好的 🙂"},
    {"instruction": "Speak.", "input": "", "output": "word " * 200},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return file


def job(source: Path, tokenizer: Path, prefix: Path, **changes: Any) -> tuple[Summary, list[str]]:
    said: list[str] = []
    settings: dict[str, Any] = {
        "input": str(source),
        "output_prefix": str(prefix),
        "tokenizer_name_or_path": str(tokenizer),
        "handler_name": "AlpacaStyleInstructionHandler",
        "prompt_type": "chatml",
    }
    return run(PreprocessConfig(**{**settings, **changes}), say=said.append), said


def samples(prefix: Path) -> list[tuple[list[int], list[int]]]:
    corpus = InstructionCorpus(str(prefix))
    return [(ids.tolist(), labels.tolist()) for ids, labels in (corpus[i] for i in range(len(corpus)))]


def test_a_data_set_becomes_samples_in_its_order_and_drops_are_counted(
    rows_file: Path, tokenizer: Path, tmp_path: Path
) -> None:
    summary, said = job(rows_file, tokenizer, tmp_path / "out" / "set", seq_length=300, log_interval=2)
    assert (summary.records, summary.samples) == (4, 2)
    assert summary.dropped == {"empty answer": (1, 1), "300 tokens or more (--seq-length)": (1, 3)}
    loaded = load_tokenizer(tokenizer, prompt_type="chatml")
    texts = [loaded.decode([t for t in labels if t != -100]) for _, labels in samples(tmp_path / "out" / "set")]
    assert texts == ["Red.<|im_end|>", "好的 🙂<|im_end|>"]
    assert "Skip 1 sample exceeded seq-length(300)" in said
    assert [line.split("(")[0] for line in said if line.startswith("Processed")] == [
        "Processed 2 documents ", "Processed 4 documents ",
    ]  # fmt: skip
    assert any("the first is record 3" in line for line in said)


def test_the_record_beside_the_files_names_tokenizer_template_and_counts(
    rows_file: Path, tokenizer: Path, tmp_path: Path
) -> None:
    job(rows_file, tokenizer, tmp_path / "set")
    record = InstructionCorpus(str(tmp_path / "set")).sidecar
    assert record is not None
    loaded = load_tokenizer(tokenizer)
    assert record["tokenizer_fingerprint"] == tokenizer_fingerprint(loaded)
    assert (record["prompt_type"], record["vocab_size"], record["seq_length"]) == ("chatml", len(loaded), None)
    assert (record["records"], record["samples"], record["dropped"]) == (4, 3, {"empty answer": 1})


def test_append_eod_ends_every_sample_with_one_more_trained_token(
    rows_file: Path, tokenizer: Path, tmp_path: Path
) -> None:
    job(rows_file, tokenizer, tmp_path / "plain")
    job(rows_file, tokenizer, tmp_path / "ended", append_eod=True)
    eos = load_tokenizer(tokenizer, prompt_type="chatml").eos_token_id
    expected = [([*ids, eos], [*labels, eos]) for ids, labels in samples(tmp_path / "plain")]
    assert samples(tmp_path / "ended") == expected


def test_several_workers_write_the_same_bytes_as_one(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.json"
    file.write_text(json.dumps([{**ROWS[0], "input": str(i), "output": "x" * (i % 3)} for i in range(1500)]))
    one, _ = job(file, tokenizer, tmp_path / "one")
    two, _ = job(file, tokenizer, tmp_path / "two", workers=2)
    assert one == two and one.samples == 1000
    for path in tmp_path.glob("one_packed_*_document.*"):
        assert path.read_bytes() == (tmp_path / path.name.replace("one_", "two_")).read_bytes()


def test_a_preview_marks_the_trained_tokens(rows_file: Path, tokenizer: Path, tmp_path: Path) -> None:
    _, said = job(rows_file, tokenizer, tmp_path / "set", preview=1)
    expected = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Red.<|im_end|>]]"
    assert [line for line in said if "[[" in line] == [expected]


def test_a_run_that_keeps_nothing_is_an_error_and_leaves_earlier_files(
    rows_file: Path, tokenizer: Path, tmp_path: Path
) -> None:
    job(rows_file, tokenizer, tmp_path / "set")
    before = samples(tmp_path / "set")
    with pytest.raises(UserError, match=r"no sample is left of 4 records: .*1 x empty answer"):
        job(rows_file, tokenizer, tmp_path / "set", seq_length=4)
    assert samples(tmp_path / "set") == before


def test_columns_that_are_not_read_are_named(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{**ROWS[0], "history": [], "source": "x"}]))
    (tmp_path / "notes.txt").write_text("")
    _, said = job(tmp_path, tokenizer, tmp_path / "out" / "set")
    assert any(line.startswith("columns not used: history, source ") for line in said)
    assert "not read: notes.txt" in said


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_flag_of_another_version_is_refused_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--input", "x", "--output-prefix", "y", "--tokenizer-name-or-path", "z", f"--{name}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--{name}: " in error and "not offered in this version" in error


def test_the_command_of_the_tutorial_writes_its_files_into_a_new_folder(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    command = [
        sys.executable, str(ROOT / "preprocess_data.py"), "--input", "./rows.json", "--output-prefix",
        "./finetune_dataset/tiny/alpaca", "--tokenizer-name-or-path", str(tokenizer), "--workers", "2",
        "--log-interval", "1000", "--tokenizer-type", "PretrainedFromHF", "--handler-name",
        "AlpacaStyleInstructionHandler", "--prompt-type", "llama2", "--overwrite-cache",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--overwrite-cache has no effect: nothing is cached" in done.stdout
    assert len(samples(tmp_path / "finetune_dataset" / "tiny" / "alpaca")) == 3
    failed = subprocess.run([*command, "--input", "gone.json"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines() == [
        "error: --input gone.json: no such file or folder; data sets are not downloaded, give a local path"
    ]


def test_no_flag_is_both_taken_and_refused() -> None:
    assert not ACCEPTED.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_prefix": "folder/"}, "is a folder"),
        ({"workers": 0}, "--workers 0"),
        ({"log_interval": 0}, "--log-interval 0"),
        ({"preview": -1}, "--preview -1"),
        ({"seq_length": 1}, "--seq-length 1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PreprocessConfig(**{"input": "a", "output_prefix": "b", "tokenizer_name_or_path": "c", **changes})


def test_parquet_and_json_of_alpaca_give_the_same_samples(tmp_path: Path) -> None:
    tokenizer = shared("models/tokenizers/mistral-v1-32k")
    for ending in ("json", "parquet"):
        file = shared(f"data/alpaca/alpaca_data_2k.{ending}")
        summary, _ = job(file, tokenizer, tmp_path / ending, prompt_type="llama2")
        assert (summary.records, summary.samples) == (2000, 1999)
    found = samples(tmp_path / "json")
    assert found == samples(tmp_path / "parquet")
    assert all(ids[0] == 1 and ids[-1] == labels[-1] == 2 for ids, labels in found)


def test_conversations_with_tools_keep_every_record(tmp_path: Path) -> None:
    summary, _ = job(
        shared("data/sharegpt/glaive_toolcall_en_200.json"),
        shared("models/tokenizers/smollm2-bpe-49k"),
        tmp_path / "set",
        handler_name="SharegptStyleInstructionHandler",
        map_keys={"tools": "tools"},
    )
    assert (summary.samples, summary.dropped) == (200, {})


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    source, tokenizer = shared("data/hit_huatuo/llama_data_1k.json"), shared("models/tokenizers/mistral-v1-32k")
    summary, _ = job(source, tokenizer, tmp_path / "set", prompt_type="alpaca")
    assert summary.records == 1000
