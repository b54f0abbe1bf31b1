"""Training jobs that are killed and stopped: nothing half written is ever read, and the next job goes on from there.

After every kill the same command resumes, as a requeued job would: from the tracker file if there is one.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from modellink_lora.checkpoint.store import TRACKER, newest, read_tracker
from tests.helpers.jobs import TORCHRUN, Job, kill
from tests.helpers.tiny import tiny_model
from tests.helpers.training import adapter_tensors, hf_to_megatron, losses, write_corpus

PROGRAM = "tests/helpers/training_program.py"
STEPS = 14
HOST = os.uname().nodename


@dataclass(frozen=True)
class Source:
    """A base, data, and the uninterrupted run on them."""

    base: Path
    data: str
    straight: Path | None = None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("crashes")
    base = hf_to_megatron(tiny_model("llama", root / "hf"), root / "base")
    source = Source(base, write_corpus(root / "data"))
    with start(source, root / "straight", root) as job:
        assert job.ends(within=120) == 0, job.text
    return Source(base, source.data, root / "straight")


def start(
    source: Source,
    save: Path,
    folder: Path,
    *,
    launcher: tuple[str, ...] = TORCHRUN,
    steps: int = STEPS,
    **flags: object,
) -> Job:
    """A job that begins where the tracker of `save` says; two tensor-parallel processes if torchrun launches it."""
    words: dict[str, object] = {
        "load": source.base, "save": save, "data-path": source.data, "seq-length": 32, "train-iters": steps, "lr": 5e-3,
        "min-lr": 1e-4, "lr-decay-style": "cosine", "split": "100,0,0", "eval-iters": 0, "global-batch-size": 4,
        "save-interval": 1, "log-interval": 1, "lora-r": 4, "lora-alpha": 8, "lora-target-modules": "linear_qkv",
        "device": "cpu", "tensor-model-parallel-size": 2 if launcher else 1, **flags,
    }  # fmt: skip
    if (save / TRACKER).is_file():
        words["lora-load"] = save
    flat = [word for name, value in words.items() for word in (f"--{name}", value)]
    return Job(PROGRAM, folder, *flat, log=folder / f"log{len(list(folder.glob('log*')))}", launcher=launcher)


def saved(save: Path) -> int:
    return int((save / TRACKER).read_text()) if (save / TRACKER).is_file() else 0


def names_and_times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def crash(job: Job, save: Path, victim: str, moment: random.Random) -> None:
    """Kill `victim` at some moment of its life; the job must then end by itself, say why, and leave good files."""
    first = saved(save)
    if moment.random() < 0.2:  # while it starts
        job.until(lambda: len(job.workers()) == 2)
        time.sleep(moment.uniform(0, 6))
    else:
        after = moment.randint(1, 3)
        job.until(lambda: saved(save) >= min(first + after, STEPS - 1))
        time.sleep(moment.uniform(0, 0.2))  # within a step and its save
    workers = job.workers()
    if victim == "launcher":
        job.process.kill()
    elif len(workers) == 2:
        kill(workers[int(victim)], signal.SIGKILL)
    job.ends(within=10 if victim == "launcher" else 60)
    after_end = names_and_times(save)
    time.sleep(0.5)
    assert names_and_times(save) == after_end, "somebody still writes"
    if saved(save):
        folder = newest(save, flag="--save")
        assert json.loads((folder / "training.json").read_text())["iteration"] == saved(save)
        assert adapter_tensors(save)


def campaign(source: Source, folder: Path, *, kills: int, seed: int) -> None:
    """Kill a run `kills` times on its way, and compare its end with the uninterrupted run's."""
    moment, save = random.Random(seed), folder / "save"
    victims = ["1", "launcher", "0"]
    moment.shuffle(victims)
    for victim in (victims * kills)[:kills]:
        with start(source, save, folder) as job:
            crash(job, save, victim, moment)
    with start(source, save, folder) as job:
        assert job.ends(within=120) == 0, job.text
    assert source.straight is not None
    assert losses(save) == losses(source.straight) and len(losses(save)) == STEPS
    expected, found = adapter_tensors(source.straight), adapter_tensors(save)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not [path.name for path in save.iterdir() if path.name.endswith((".tmp", ".old", ".lock"))]


def test_a_run_that_is_killed_three_times_ends_like_one_that_was_not(source: Source, tmp_path: Path) -> None:
    campaign(source, tmp_path, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_runs_that_are_killed_at_thirty_moments_end_like_one_that_was_not(
    source: Source, tmp_path: Path, seed: int
) -> None:
    campaign(source, tmp_path, kills=3, seed=seed)


def test_a_second_writer_is_refused_and_sigterm_to_the_launcher_saves_on_every_rank(
    source: Source, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    with start(source, save, tmp_path, steps=100000, **{"save-interval": 3, "save-total-limit": 2}) as job:
        job.until(lambda: saved(save) >= 3)
        (holder,) = {int((save / ".lock").read_text().split()[1])} & {p.pid for p in job.workers()}
        (tmp_path / "second").mkdir()
        with start(source, save, tmp_path / "second", launcher=()) as second:
            assert second.ends(within=60) == 1
        assert re.fullmatch(
            rf"error: --save {save} is being written by another job: process {holder} on host {HOST}, since \S+: "
            r"stop it, or choose another folder\n", second.text,
        ), second.text  # fmt: skip
        began = time.monotonic()
        job.process.terminate()
        assert job.ends(within=25) == 1, "torchrun's own status after a signal"
        assert time.monotonic() - began < 25
        assert [(tmp_path / f"status.{rank}").read_text() for rank in (0, 1)] == ["0", "0"], job.text
        last = saved(save)
        assert last == len(losses(save)) and f"iteration {last} is saved" in job.text
        assert job.text.count("SIGTERM: the job saves after this step and ends") == 1 and "error:" not in job.text


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_a_single_process_saves_and_is_status_0(source: Source, tmp_path: Path, number: int) -> None:
    save = tmp_path / "save"
    with start(source, save, tmp_path, launcher=(), steps=100000, **{"save-interval": 100000}) as job:
        job.until(lambda: (save / "metrics.jsonl").is_file() and len(losses(save)) > 1)
        job.process.send_signal(number)
        assert job.ends(within=25) == 0, job.text
    assert read_tracker(save, flag="--save") == len(losses(save)) > 1


@pytest.mark.slow
def test_a_job_started_by_hand_outlives_its_shell(source: Source, tmp_path: Path) -> None:
    """No torchrun is there to die: the process is an orphan on purpose."""
    save = tmp_path / "save"
    shell = ("-c", "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]])")
    with start(source, save, tmp_path, launcher=shell, **{"tensor-model-parallel-size": 1}) as job:
        limit = time.monotonic() + 90
        while saved(save) < STEPS:
            assert time.monotonic() < limit, job.text
            time.sleep(0.1)
        assert job.process.poll() == 0
