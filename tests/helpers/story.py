"""A folder as the launch scripts expect it: a small model, data sets and questions at the scripts' own places."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from tests.helpers.scripts import ROOT
from tests.helpers.tiny import tiny_model
from tests.helpers.tiny_tokenizer import make_tokenizer

PARQUET = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
PROGRAMS = ("preprocess_data.py", "posttrain_gpt.py", "convert_ckpt.py", "inference.py", "evaluation.py")


def enter_repository(folder: Path) -> Path:
    """Links to the programs and scripts, so that commands typed in this repository run in `folder` as they are."""
    for name in (*PROGRAMS, "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def write_model(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **overrides: object
) -> Path:
    """A two-layer model with room for the lengths of the scripts, and a tokenizer that knows their templates."""
    tiny_model(family, folder, dtype=dtype, vocab_size=420, max_position_embeddings=4096, **{
        "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, **overrides,
    })  # fmt: skip
    return make_tokenizer(folder, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"))


def write_data(folder: Path, *, records: int = 64) -> None:
    """./dataset: instructions as parquet, conversations as JSON lines; ./mmlu: two subjects."""
    import pyarrow
    import pyarrow.parquet

    (folder / "dataset").mkdir()
    words = ("red", "yellow", "blue", "Paris", "Oslo", "five", "two", "three")
    rows = [
        {"instruction": f"Name colour {i}.", "input": words[i % 3], "output": f"{words[i % 8]} and {words[i % 5]}."}
        for i in range(records)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "dataset" / PARQUET)
    with (folder / "dataset/sharegpt.jsonl").open("w") as file:
        for row in rows:
            said = [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]
            file.write(json.dumps({"conversations": said}) + "\n")
    for part, questions in {"test": 3, "dev": 5}.items():
        (folder / "mmlu" / part).mkdir(parents=True)
        for subject in ("astronomy", "virology"):
            with (folder / "mmlu" / part / f"{subject}_{part}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                for i in range(questions):
                    writer.writerow([f"What is colour {i}?", *words[i : i + 4], "ABCD"[i % 4]])


def write_other_tasks(folder: Path) -> None:
    """One question for each task besides MMLU, at ./TASK."""
    rows = {
        "boolq/test.jsonl": {"passage": "Snow is cold.", "question": "is snow cold", "answer": True},
        "agieval/lsat-ar.jsonl": {
            "passage": "", "question": "Which?", "options": ["(A)one", "(B)two"], "label": "A", "answer": None,
        },
        "human_eval/human_eval.jsonl": {
            "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n",
        },
        "bbh/boolean.json": {"examples": [{"input": "True and False is", "target": "False"}]},
    }  # fmt: skip
    for name, row in rows.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(row))
    for part in ("val", "dev"):
        (folder / "ceval" / part).mkdir(parents=True)
        questions = "".join(f"{i},Which {i}?,a,b,c,d,A,because\n" for i in range(5))
        (folder / f"ceval/{part}/law_{part}.csv").write_text(f"id,question,A,B,C,D,answer,explanation\n{questions}")
