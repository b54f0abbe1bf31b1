"""What a message says about its loss is obeyed, or the record is dropped: never trained against what it says.

Reported as axolotl-ai-cloud/axolotl#1703 (`weight: 0`), openai/openai-cookbook#1270 (a weight is 0 or 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.corpus import InstructionCorpus
from modellink_lora.data.handlers import reader_for
from modellink_lora.data.preprocess import Summary, run
from tests.helpers.tiny import tiny_tokenizer

SHAREGPT = "SharegptStyleInstructionHandler"
END = 258


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return str(folder)


def talk(*answers: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for number, answer in enumerate(answers):
        messages += [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": f"a{number}", **answer}]
    return {"conversations": messages}


def preprocess(rows: list[dict[str, Any]], tokenizer: str, folder: Path, **fields: Any) -> Summary:
    if fields.pop("parquet", False):
        source = folder / "d.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source = folder / "d.json"
        source.write_text(json.dumps(rows))
    config = PreprocessConfig(
        input=str(source), output_prefix=str(folder / "a"), tokenizer_name_or_path=tokenizer,
        handler_name=SHAREGPT, prompt_type="default", **fields,
    )  # fmt: skip
    return run(config, say=lambda line: None)


def trained(folder: Path) -> list[str]:
    """The trained text of each sample, `.` for the end token; every token is asked for its own label."""
    corpus = InstructionCorpus(str(folder / "a"))
    texts = []
    for ids, labels in (corpus[i] for i in range(len(corpus))):
        assert set(labels[labels != ids]) <= {-100}
        texts.append("".join("." if token == END else chr(token) for token in labels if token >= 0))
    return texts


SWITCHES: list[dict[str, Any]] = [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"train_turn": 0},
                                  {"weight": 0, "loss": False}]  # fmt: skip
ON: list[dict[str, Any]] = [{}, {"weight": 1}, {"loss": True}, {"train": True}, {"weight": None}, {"train_detail": []}]


@pytest.mark.parametrize("parquet", [False, True])
def test_an_answer_that_is_switched_off_is_shown_and_not_trained(parquet: bool, tokenizer: str, tmp_path: Path) -> None:
    rows = [talk(off, on) for off in SWITCHES for on in ON]
    if parquet:  # a column has one type, so one row after the other
        rows = [talk({"weight": 0}, {"weight": 1}), talk({"train": False}, {}), talk({}, {})]
    summary = preprocess(rows, tokenizer, tmp_path, parquet=parquet)
    expected = ["a1."] * len(rows) if not parquet else ["a1.", "a1.", "a0.a1."]
    assert trained(tmp_path) == expected and summary.samples == len(rows)
    ids = InstructionCorpus(str(tmp_path / "a"))[0][0]
    assert bytes(int(token) for token in ids if token < 256) == b"Human: q0\nAssistant:a0\nHuman: q1\nAssistant:a1"


def test_the_last_answer_may_be_the_one_that_is_not_trained(tokenizer: str, tmp_path: Path) -> None:
    rows = [talk({}, {"weight": 0}), talk({"loss": False}, {"loss": False})]
    summary = preprocess(rows, tokenizer, tmp_path)
    assert trained(tmp_path) == ["a0."]
    assert summary.dropped == {"no token of an answer is left to train": (1, 1)}


def test_the_token_of_append_eod_is_trained_like_the_answer_before_it(tokenizer: str, tmp_path: Path) -> None:
    rows = [talk({}, {"weight": 0}), talk({"weight": 0}, {}), talk({"weight": 0})]
    summary = preprocess(rows, tokenizer, tmp_path, append_eod=True)
    assert trained(tmp_path) == ["a0.", "a1.."]
    assert summary.dropped == {"no token of an answer is left to train": (1, 2)}
    assert [ids[-1] for ids, _ in (InstructionCorpus(str(tmp_path / "a"))[i] for i in range(2))] == [END, END]


WHOLE = "is neither 0 nor 1: an answer is trained as a whole or not at all"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"weight": 0.5}, f"weight of a message of 'gpt' {WHOLE}"),
        ({"weight": -1}, f"weight of a message of 'gpt' {WHOLE}"),
        ({"weight": float("nan")}, f"weight of a message of 'gpt' {WHOLE}"),
        ({"loss": "false"}, f"loss of a message of 'gpt' {WHOLE}"),
        ({"train_detail": [{"begin_offset": 0}]}, f"train_detail of a message of 'gpt' {WHOLE}"),
        ({"weight": 1, "train": False}, "weight and train of a message of 'gpt' contradict each other"),
    ],
)
def test_what_cannot_be_obeyed_drops_the_record(message: dict[str, Any], reason: str) -> None:
    assert reader_for(SHAREGPT, None, ("conversations",)).read(talk(message)) == reason


def test_a_question_that_is_to_be_trained_drops_the_record() -> None:
    reader = reader_for(SHAREGPT, None, ("conversations",))
    for number, role in ((0, "system"), (1, "human")):
        row = talk({})
        row["conversations"].insert(0, {"from": "system", "value": "s", "weight": 0})
        assert not isinstance(reader.read(row), str)
        row["conversations"][number]["weight"] = 1
        assert reader.read(row) == f"weight of a message of '{role}' asks to train it: only answers can be trained"
