"""`evaluation.py` as a command: killed and continued, refusals before a model is loaded, ModelLink's flags."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import ROOT, Job
from tests.helpers.tiny import tiny_model

QUESTIONS = 300


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model `hf` and an exam of two subjects in `mmlu`."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model("llama", folder / "hf", tokenizer=True, max_position_embeddings=512)
    for split, count in (("dev", 2), ("test", QUESTIONS)):
        (folder / split).mkdir()
        for subject in ("virology", "sociology"):
            rows = [f"{subject} {n}?,{n},{n + 1},{n + 2},{n + 3},{'ABCD'[n % 4]}\n" for n in range(count)]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(rows))
    return folder


def words(base: Path, save: Path, *more: object) -> list[str]:
    return [
        str(word)
        for word in (
            ROOT / "evaluation.py", "--task", "mmlu", "--task-data-path", f"{base / 'test'}/", "--load", base / "hf",
            "--num-shots", 2, "--device", "cpu", "--save", save, "--evaluation-batch-size", 4, *more,
        )
    ]  # fmt: skip


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def answered(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_a_killed_evaluation_goes_on_where_it_stopped(base: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    part = save / "mmlu/items.rank0.jsonl"
    with Job(*words(base, save), log=tmp_path / "log", launcher=()) as job:
        job.until(lambda: part.is_file() and part.stat().st_size > 0)
        job.process.send_signal(signal.SIGKILL)
        job.process.wait()
    before = answered(part)
    assert 0 < len(before) < 2 * QUESTIONS
    with part.open("a") as file:
        file.write('{"subject": "virol')  # as if the kill had come in the middle of a line
    # scripts of ModelLink's give these beside; the flags of training have no effect here
    legacy = "--micro-batch-size 1 --seq-length 4096 --no-load-rng --no-load-optim --max-new-tokens 1 --use-kv-cache"
    done = evaluate(*words(base, save, *legacy.split()))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(before)} answered before" in done.stdout
    assert "--micro-batch-size has no effect: " in done.stdout and "--max-new-tokens has no effect: " in done.stdout
    found = answered(save / "mmlu/items.jsonl")
    assert found[: len(before)] == before
    keys = [(item["subject"], item["number"]) for item in found]
    assert keys == [(subject, n) for subject in ("sociology", "virology") for n in range(QUESTIONS)]
    right = sum(item["models"]["base"]["correct"] for item in found)
    assert f"mmlu acc = {right}/{2 * QUESTIONS}=" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "human_eval", "--task-data-path", "/nowhere"], "--allow-code-execution"),
        (["--task", "mmlu", "cmmlu", "--task-data-path", "/nowhere"], "one folder for each task"),
        (["--task", "mmlu", "--task-data-path", "/nowhere"], "--task-data-path /nowhere: no such folder"),
        (["--task", "mmlu", "--task-data-path", "/nowhere", "--max-eval-samples", "0"], "--max-eval-samples 0"),
        (["--task", "mmul", "--task-data-path", "/nowhere"], "'mmul' is not one of mmlu, cmmlu"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modellink_lora.cli.evaluate import main
    from modellink_lora.cli.main import run

    monkeypatch.setattr("modellink_lora.cli.evaluate.joined", None)  # what would start the processes
    monkeypatch.setattr("modellink_lora.cli.main.watch_launcher", lambda: None)
    try:
        status = run(lambda: main([*flags, "--load", "/nowhere"]))
    except SystemExit as error:  # the parser's own mistakes
        status = int(error.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    assert status != 0 and len(lines) == 1 and said in lines[0]
