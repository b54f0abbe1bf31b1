"""The end of a process of the same parent: noticed at once, with its signal."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import queue, sys
from modellink_lora.parallel.siblings import identity, watch_siblings
print(identity(), flush=True)
told = queue.Queue()
watch_siblings({1: sys.stdin.readline().strip()}, lambda *what: told.put(what))
print("watching", flush=True)
print(*told.get(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="siblings are watched by Linux's /proc")
@pytest.mark.parametrize(
    ("code", "number", "told"),
    [
        ("import time; time.sleep(60)", signal.SIGKILL, "1 SIGKILL"),
        ("import time; time.sleep(60)", signal.SIGSEGV, "1 SIGSEGV"),
        ("input(); raise SystemExit(3)", None, "1 None"),
    ],
)
def test_a_sibling_that_ends_is_told_with_its_signal(code: str, number: int | None, told: str) -> None:
    """Nobody collects its status here before the witness has looked, as torchrun leaves time to."""
    sibling = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as witness:
        assert witness.stdin and witness.stdout and sibling.stdin
        own = witness.stdout.readline().split(" ", 1)[1]
        witness.stdin.write(f"{sibling.pid} {own}")
        witness.stdin.flush()
        assert witness.stdout.readline() == "watching\n"
        if number is None:
            sibling.stdin.close()
        else:
            sibling.send_signal(number)
        assert witness.stdout.readline().strip() == told
    sibling.wait()


def test_a_process_of_another_container_is_not_taken_for_a_sibling() -> None:
    from modellink_lora.parallel.siblings import watch_siblings

    ended: queue.Queue[object] = queue.Queue()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        watch_siblings({1: f"{stranger.pid} other pid:[1]", 2: ""}, lambda *what: ended.put(what))
        stranger.kill()
    time.sleep(0.3)
    assert ended.empty()
