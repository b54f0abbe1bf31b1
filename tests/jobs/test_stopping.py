"""How a job of several processes ends when one of them does: quickly, all of it, with one line that says why."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.jobs import BARE, TORCHRUN, Job, kill, running
from tests.helpers.liveness_program import PATIENCE

HOST = os.uname().nodename
PROGRAM = "tests/helpers/liveness_program.py"


def start(what: str, folder: Path, launcher: tuple[str, ...] = TORCHRUN) -> Job:
    return Job(PROGRAM, what, folder, log=folder / "log", launcher=launcher)


def begun(job: Job, folder: Path) -> None:
    job.until(lambda: (folder / "step").is_file() and len(job.workers()) == 2)


def our_lines(job: Job) -> list[str]:
    return [line for line in job.text.splitlines() if line.startswith(("error:", "rank ", "SIG"))]


@pytest.mark.slow
def test_a_job_whose_processes_finish_apart_ends_well(tmp_path: Path) -> None:
    with start("finish", tmp_path, BARE) as job:
        assert job.ends(within=60) == 0
        assert our_lines(job) == []


def test_a_stopped_process_is_a_vanished_host_found_by_its_heartbeat(tmp_path: Path) -> None:
    """Its sockets stay open, so that no collective ever fails."""
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        stopped, began = job.workers()[1], time.monotonic()
        kill(stopped, signal.SIGSTOP)
        job.until(lambda: our_lines(job), seconds=PATIENCE + 10)
        assert time.monotonic() - began >= PATIENCE - 1
        kill(stopped, signal.SIGKILL)  # torchrun waits 30 s for it
        assert job.ends(within=20) != 0
        (line,) = our_lines(job)
        assert line == f"error: rank 1 on host {HOST} is gone: no sign of life for {PATIENCE:g} s; the job ends"
        assert f": {line}" in job.text, "torchrun's summary shows it too"


@pytest.mark.slow
def test_rank_0_stopped_is_found_by_the_others(tmp_path: Path) -> None:
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        stopped = job.workers()[0]
        kill(stopped, signal.SIGSTOP)
        job.until(lambda: our_lines(job), seconds=PATIENCE + 10)
        kill(stopped, signal.SIGKILL)
        assert job.ends(within=20) != 0
        assert our_lines(job) == [
            f"error: rank 0 on host {HOST} is gone: no sign of life for {PATIENCE:g} s; the job ends"
        ]


@pytest.mark.slow
def test_rank_0_that_takes_the_store_with_it_is_named(tmp_path: Path) -> None:
    with start("nothing", tmp_path, BARE) as job:
        begun(job, tmp_path)
        kill(job.workers()[0], signal.SIGKILL)
        assert job.ends(within=20) != 0
        (line,) = our_lines(job)
        # nobody can tell by which signal: the one who started it has collected it at once
        assert line.startswith(f"error: rank 0 on host {HOST} or its launcher is gone: the job's store at ")
        assert job.text.endswith(f"{line}\n") and "gloo" not in job.text  # c10d's own warning comes before


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_instead_of_a_broken_socket(tmp_path: Path, rank: int) -> None:
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        kill(job.workers()[rank], signal.SIGKILL)
        assert job.ends(within=20) != 0
        lines = [line for line in our_lines(job) if not line.startswith("SIG")]
        assert lines == [f"error: rank {rank} on host {HOST} is gone: ended by SIGKILL; the job ends"], job.text
        assert "Signal 9 (SIGKILL)" in job.text, "torchrun knows the signal"
        assert "Traceback" not in job.text.split("torch/distributed")[0] and "gloo" not in job.text


def test_a_failing_rank_is_heard_and_ends_all(tmp_path: Path) -> None:
    with start("fail", tmp_path) as job:
        assert job.ends(within=60) != 0
        line = f"rank 1 on host {HOST}: error: --seed 7: an unlucky number; choose another"
        assert our_lines(job) == [line], job.text
        assert f": {line}" in job.text and 'liveness_program.py", line' not in job.text


@pytest.mark.slow
def test_a_mistake_of_ours_keeps_its_traceback_once(tmp_path: Path) -> None:
    with start("bug", tmp_path) as job:
        assert job.ends(within=60) != 0
        assert our_lines(job) == [f"rank 1 on host {HOST}: error: KeyError: 'lost'"], job.text
        assert job.text.count("raise KeyError") == 1


@pytest.mark.slow
def test_sigterm_with_a_dead_process_names_it_and_does_not_wait_for_a_save(tmp_path: Path) -> None:
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        stopped = job.workers()[1]
        kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        kill(job.workers()[0], signal.SIGTERM)
        job.until(lambda: len(our_lines(job)) > 1, seconds=10)
        assert time.monotonic() - began < PATIENCE
        kill(stopped, signal.SIGKILL)
        assert job.ends(within=20) != 0
        assert our_lines(job) == [
            "SIGTERM: the job saves after this step and ends",
            f"error: rank 1 on host {HOST} is gone: no sign of life for 1.5 s; the job ends",
        ]


@pytest.mark.slow
def test_sigterm_that_the_loop_does_not_heed_ends_the_job_with_the_newest_checkpoint(tmp_path: Path) -> None:
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        for worker in job.workers():
            kill(worker, signal.SIGTERM)
        assert job.ends(within=20) == 1
        told, late = our_lines(job)
        assert told == "SIGTERM: the job saves after this step and ends"
        assert late.endswith(f"error: not saved within 4 s of SIGTERM; --save {tmp_path} holds no checkpoint")
        assert "exitcode  : 143" in job.text


@pytest.mark.slow
def test_sigterm_before_the_first_step_says_that_there_is_nothing_to_save(tmp_path: Path) -> None:
    with start("loading", tmp_path) as job:
        begun(job, tmp_path)
        for worker in job.workers():
            kill(worker, signal.SIGTERM)
        assert job.ends(within=20) == 1
        assert sum("SIGTERM before the first step: nothing to save" in line for line in our_lines(job)) == 1, job.text
        assert "exitcode  : 143" in job.text


@pytest.mark.slow
def test_the_processes_of_a_dead_launcher_end_with_it(tmp_path: Path) -> None:
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        job.process.kill()
        job.ends(within=10)
        assert our_lines(job) == [
            f"error: the launcher (torchrun, process {job.process.pid}) is gone: its processes end with it"
        ]


@pytest.mark.slow
def test_a_store_that_neither_answers_nor_closes_is_a_vanished_host_too(tmp_path: Path) -> None:
    with start("nothing", tmp_path) as job:
        begun(job, tmp_path)
        kill(psutil.Process(job.process.pid), signal.SIGSTOP)
        workers = job.workers()
        job.until(lambda: our_lines(job), seconds=PATIENCE + 10)
        (line,) = our_lines(job)
        assert re.fullmatch(
            rf"error: rank 0 on host {HOST} or its launcher is gone: the job's store at \S+ has not answered for 3 s",
            line,
        )
        job.until(lambda: not any(map(running, workers)), seconds=10)
        job.process.kill()
