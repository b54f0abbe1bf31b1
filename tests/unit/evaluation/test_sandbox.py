"""The process that runs a model's code: what it may do, and that it ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from modellink_lora.evaluation.sandbox import FILE_BYTES, MEMORY_BYTES, passes


def test_a_program_that_ends_passes_and_one_that_raises_does_not() -> None:
    assert passes("assert sorted([2, 1]) == [1, 2]")
    assert not passes("assert sorted([2, 1]) == [2, 1]")
    assert not passes("def f(:")


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_before_the_tests_is_no_success(leave: str) -> None:
    assert not passes(f"{leave}\nassert False")


def test_it_sees_an_empty_folder_no_environment_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert passes(
        "import os, sys\nassert os.listdir('.') == []\nassert not set(os.environ) - {'LC_CTYPE'}, os.environ\n"
        "assert sys.stdin.read() == ''\nopen('own', 'w').write('x')"
    )


@pytest.mark.parametrize(
    "greedy",
    [f"x = bytearray({MEMORY_BYTES})", f"with open('big', 'wb') as file: file.write(b'x' * {FILE_BYTES + 1})"],
)
def test_it_may_not_use_much_memory_or_disk(greedy: str) -> None:
    assert not passes(greedy)


def test_it_may_not_start_processes() -> None:
    assert passes("import resource\nassert resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0)")
    if os.geteuid() != 0:  # the operating system does not hold root to it
        assert not passes("import os\nos.fork()")


def test_its_whole_session_is_gone_after_the_deadline(tmp_path: Path) -> None:
    """That this returns shows that there is a deadline: the program itself never ends."""
    pids = tmp_path / "pids"
    program = f"import os, time\nos.fork()\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
    assert not passes(f"{program}while True: time.sleep(1.125)", seconds=3)
    left = [int(pid) for pid in pids.read_text().split()]
    assert left, "the program wrote who it is"
    for _ in range(300):  # the kernel takes its time after the signal
        if not (left := [pid for pid in left if is_running(pid)]):
            break
        time.sleep(0.1)
    assert not left


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
