"""Training jobs as separate processes that a test can watch, signal and kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# two processes as srun starts them: rank 0 then holds the job's store, which torchrun's agent otherwise does
BARE = (
    "-c",
    """
import os, socket, subprocess, sys
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
ranks = [{"RANK": rank, "LOCAL_RANK": rank, **place, **os.environ} for rank in "01"]
started = [subprocess.Popen([sys.executable, *sys.argv[1:]], env=rank) for rank in ranks]
sys.exit(max(abs(process.wait()) for process in started))
""",
)


class Job:
    """A command of this repository that runs in the background; what it prints is kept in a file.

    Args:
        inside: words that go before the whole command.
    """

    def __init__(
        self, *words: object, log: Path, launcher: tuple[str, ...] = TORCHRUN, inside: tuple[str, ...] = ()
    ) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*inside, sys.executable, *launcher, *map(str, words)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running, whatever the test found."""
        for process in [*self.workers(), psutil.Process(os.getpid())]:
            if process.pid != os.getpid():
                kill(process, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """Processes that the launcher has started so far and that still run, by rank; its orphans too."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen.setdefault(child.pid, child)
        return [p for p in sorted(self._seen.values(), key=lambda p: p.pid) if running(p)]

    def until(self, there: Callable[[], object], *, seconds: float = 90) -> None:
        """Wait for a condition; the job must not end before."""
        limit = time.monotonic() + seconds
        while not there():
            assert self.process.poll() is None, self.text[-6000:]
            assert time.monotonic() < limit, self.text[-6000:]
            self.workers()
            time.sleep(0.02)

    def ends(self, *, within: float) -> int:
        """Wait for launcher and workers; the launcher's exit status."""
        limit = time.monotonic() + within
        while self.workers() or self.process.poll() is None:
            assert time.monotonic() < limit, f"still there after {within} s: {self.workers()}\n{self.text[-6000:]}"
            time.sleep(0.05)
        return self.process.wait()


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
