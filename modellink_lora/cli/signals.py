"""SIGTERM and SIGUSR1 as a wish to save and end, which the training loop reads; what happens when it cannot."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from modellink_lora.checkpoint.store import newest
from modellink_lora.cli.ending import end, under_torchrun, write_line
from modellink_lora.cli.launch import Launch
from modellink_lora.config.errors import UserError

if TYPE_CHECKING:
    from modellink_lora.parallel.liveness import Liveness

ASKING = (signal.SIGTERM, signal.SIGUSR1)
SAVE_SECONDS = 25.0  # torchrun and SLURM kill 30 seconds after SIGTERM
SIBLING_SECONDS = 0.5  # within which a process notices, while it loads libraries, that another of its host has died
INTERRUPT_SECONDS = 10.0  # from Ctrl-C to an end that does not wait for the main thread


class Stop:
    """The wish, as the training loop sees it: call it once a step for the name of the signal, or None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.stepped = False  # the loop has asked once: there is something to save
        self.failing = False  # the main thread is already ending the process
        self.peers: Liveness | None = None

    def __call__(self) -> str | None:
        self.stepped = True
        return self.received


@contextlib.contextmanager
def stopping(launch: Launch, save: Path | None, *, seconds: float = SAVE_SECONDS) -> Iterator[Stop]:
    """Let signals ask for an end inside the block; outside it they have their former meaning.

    A thread listens: Python runs a handler only when the main thread is back in Python, and a collective whose other
    processes are gone does not come back.

    Args:
        save: folder of the checkpoints, of which the newest is named when time runs out.
        seconds: how long the loop may take from the signal to the end of the process.
    """
    stop = Stop()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, _noted) for number in ASKING}
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, stop, launch, save, seconds), name="signals", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(former)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # the thread reads the end of the pipe and returns
        thread.join(1)
        os.close(reader)


def _noted(number: int, frame: object) -> None:
    """There must be a handler, or the signal ends the process; the thread does what there is to do."""


def _listen(reader: int, stop: Stop, launch: Launch, save: Path | None, seconds: float) -> None:
    limits: dict[signal.Signals, float] = {}  # when the process must be gone
    while True:
        patience = max(0.0, min(limits.values()) - time.monotonic()) if limits else None
        if not select.select([reader], [], [], patience)[0]:
            number = min(limits, key=limits.__getitem__)
            late = f"error: not saved within {seconds:g} s of {number.name}; {_newest(save)}"
            _say_and_end(stop, launch, "stopped" if number is signal.SIGINT else late, 128 + number)
        numbers = os.read(reader, 64)
        if not numbers:
            return
        for number in map(signal.Signals, numbers):
            if number is signal.SIGINT:  # Python raises KeyboardInterrupt in the main thread, if that can run
                limits[number] = time.monotonic() + INTERRUPT_SECONDS
            if number not in ASKING or stop.failing:  # failing: the reason is being found out, and told in seconds
                continue
            if not stop.stepped:
                if stop.peers and number is signal.SIGTERM:  # which torchrun sends also because a process has died
                    time.sleep(SIBLING_SECONDS)
                    stop.peers.blame_sibling()
                _say_and_end(stop, launch, f"{number.name} before the first step: nothing to save", 128 + number)
            stop.received = stop.received or number.name
            if launch.is_first:
                write_line(f"{number.name}: the job saves after this step and ends")
            if number is signal.SIGTERM or under_torchrun():  # else SIGUSR1 is an early warning, and no kill follows
                limits[number] = time.monotonic() + seconds
                if stop.peers:
                    stop.peers.alarm()  # somebody may have died, as above


def _say_and_end(stop: Stop, launch: Launch, line: str, status: int) -> NoReturn:
    if stop.peers:
        stop.peers.end(line, status)
    end(line, status, speak=launch.local_rank == 0)


def _newest(save: Path | None) -> str:
    if save is None:
        return "no --save was given"
    try:
        return f"the newest checkpoint is {newest(save, flag='--save')}"
    except (UserError, OSError):
        return f"--save {save} holds no checkpoint"
