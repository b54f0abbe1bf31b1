"""`inference.py` as users start it: the printed answers, the file of a batch, a chat on a pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modellink_lora.config.infer import BATCH_TASKS
from tests.helpers.answering import made_pair
from tests.helpers.jobs import ROOT, TORCHRUN


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made_pair(tmp_path_factory.mktemp("pair"))


def run(
    pair: tuple[Path, Path], *words: object, text: str = "", launcher: tuple[str, ...] = (), status: int = 0
) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, "inference.py", "--load", *map(str, (pair[0], "--lora-load", pair[1], *words))],
        cwd=ROOT, input=text, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def batch(pair: tuple[Path, Path], folder: Path, name: str, *words: object, launcher: tuple[str, ...] = ()) -> str:
    """Standard output of all four tasks over three prompts, written to the file `name`."""
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": "Red, yellow"}, {"prompt": "The capital of France is Paris. The sum"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [
        {"role": "user", "content": "Add two"}, {"role": "assistant", "content": "five"},
        {"role": "user", "content": "and three"}]}]))  # fmt: skip
    return run(
        pair, "--prompt-file", prompts, "--prompt-type", "qwen", "--max-new-tokens", 9, "--output", folder / name,
        *words, launcher=launcher,
    )  # fmt: skip


@pytest.mark.slow
def test_without_a_task_four_are_written_and_no_chat_waits_on_a_pipe(pair: tuple[Path, Path], tmp_path: Path) -> None:
    said = batch(pair, tmp_path, "one.jsonl")
    assert "ModelLink:" not in said and "You >>" not in said
    assert f"12 answers written to {tmp_path / 'one.jsonl'}" in said
    written = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [(row["task"], row["index"]) for row in written] == [(task, n) for task in BATCH_TASKS for n in range(3)]
    assert written[0]["prompt"] == "Red, yellow" and written[2]["prompt"][0]["content"] == "Add two"
    assert {row["adapter"] for row in written} == {"tuned"}
    assert [row["seed"] for row in written[:3]] == [1234, 1235, 1236]
    assert all(len(row["token_ids"]) == 9 or row["finish_reason"] == "stop" for row in written)
    assert written[0]["token_ids"] != written[3]["token_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "prompts.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_two_processes_write_the_same_batch(pair: tuple[Path, Path], tmp_path: Path, flag: str) -> None:
    batch(pair, tmp_path, "one.jsonl")
    batch(pair, tmp_path, "two.jsonl", flag, 2, launcher=TORCHRUN)
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_four_banners_and_then_a_chat_on_a_pipe(pair: tuple[Path, Path]) -> None:
    lines = ["The sum", "/both", "", "The sum", "/nothing", "/adapter other", "/adapter tuned 0", "clear", "The sum"]
    printed = run(
        pair, "--task", *BATCH_TASKS, "chat", "--temperature", 0, "--max-new-tokens", 6, text="\n".join(lines) + "\n"
    )
    titles = re.findall(r"=+ (.+) =+\n", printed)
    assert titles == ["Greedy Search", "Do Sample", "Beam Search", "Beam Search with Sampling"]
    assert printed.count("You:\nhow are you?\n\nModelLink:\n") == 4
    assert len(re.findall(r"^Elapsed: \d+\.\d\ds$", printed, re.MULTILINE)) == 4
    chat = printed[printed.index("Chat with tuned.") :]
    assert "\x1b" not in chat and chat.count("You >> ") == len(lines) + 1
    first, base, tuned, scaled = re.findall(r"ModelLink(?: \((?:base|tuned)\))?: (.*)", chat)
    assert base != first, "another model, with nothing said before"
    assert tuned != first, "it remembers its first answer"
    assert "Now base and tuned will answer." in chat and "/nothing: no such command" in chat
    assert "no adapter other; there are base, tuned" in chat and "Now tuned x 0 will answer." in chat
    assert scaled == base, "an adapter of strength 0, after clear, is the base"
