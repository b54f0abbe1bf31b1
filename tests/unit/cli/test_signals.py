"""Signals that ask a job to stop: noted for the loop, and obeyed without it when it cannot come."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modellink_lora.checkpoint.store import iteration_folder, write_tracker

# a mutex that is locked twice: like a collective whose partners are gone, it never comes back to Python
HANG = """
import ctypes
mutex, c = ctypes.create_string_buffer(128), ctypes.CDLL(None)
while True:
    c.pthread_mutex_lock(mutex)
"""
SAVE = """
while not stop():
    time.sleep(0.01)
print(stop(), flush=True)
"""
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell begins with it ignored
from pathlib import Path
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.signals import stopping
with stopping(Launch(), Path(sys.argv[1]), seconds=0.5) as stop:
    if {stepped}:
        stop()
    print("there", flush=True)
{body}
"""


def told(body: str, number: int, save: Path, *, stepped: bool = True) -> tuple[int, str, str]:
    """Status, output and errors of a process that gets a signal in the middle of `body`."""
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    code = PROGRAM.replace("{body}", indented).replace("{stepped}", str(stepped))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(save)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_loop_learns_the_name_of_the_signal_and_the_job_ends_well(name: str, tmp_path: Path) -> None:
    status, out, err = told(SAVE, signal.Signals[name], tmp_path)
    assert (status, out, err) == (0, f"{name}\n", f"{name}: the job saves after this step and ends\n")


def test_a_loop_that_hangs_is_ended_with_the_newest_checkpoint_named(tmp_path: Path) -> None:
    iteration_folder(tmp_path, 7).mkdir()
    write_tracker(tmp_path, 7)
    status, _, err = told(HANG, signal.SIGTERM, tmp_path)
    assert status == 143
    assert err.splitlines()[1:] == [
        f"error: not saved within 0.5 s of SIGTERM; the newest checkpoint is {tmp_path}/iter_0000007"
    ]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    status, _, err = told(HANG, signal.SIGTERM, tmp_path, stepped=False)
    assert (status, err) == (143, "SIGTERM before the first step: nothing to save\n")


def test_the_warning_of_a_scheduler_sets_no_limit(tmp_path: Path) -> None:
    status, out, _ = told("time.sleep(1.5)\nprint(stop())", signal.SIGUSR1, tmp_path)
    assert (status, out) == (0, "SIGUSR1\n")


def test_ctrl_c_interrupts_as_ever(tmp_path: Path) -> None:
    status, _, err = told("time.sleep(20)", signal.SIGINT, tmp_path)
    assert status == -signal.SIGINT and err.endswith("KeyboardInterrupt\n")


def test_outside_the_block_signals_have_their_former_meaning(tmp_path: Path) -> None:
    from modellink_lora.cli.launch import Launch
    from modellink_lora.cli.signals import stopping

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with stopping(Launch(), tmp_path):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
