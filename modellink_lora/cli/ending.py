"""How a process ends before its job is done: one line, a note for torchrun's summary, no waiting for other threads.

Standard library only: the launcher is watched before torch is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from typing import Any, NoReturn, TextIO

_ending = threading.Lock()  # taken once and never given back: the first reason is the one that is told


def end(line: str, status: int, *, speak: bool = True, linger: float = 0.0) -> NoReturn:
    """Print `line` on standard error if `speak`, and end with `status`, whatever the main thread is in.

    Args:
        line: the reason; a traceback may precede it.
        linger: seconds to stay after the line, so that other processes can still read why from this one.
    """
    _ending.acquire()
    record_error(line.rpartition("\n")[2])
    if speak:
        write_line(line)
    time.sleep(linger)
    os._exit(status)


def write_line(line: str) -> None:
    """Print past Python's streams, whose locks a blocked thread may hold."""
    with contextlib.suppress(OSError):  # nobody may be left to read
        os.write(2, f"{line}\n".encode())


def record_error(line: str, error: BaseException | None = None) -> None:
    """Leave `line` where torchrun looks for the reason of a failure, so that its summary shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    shown = "".join(traceback.format_exception(error)) if error else line  # torchrun prints this field only
    extra = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": line, "extraInfo": extra}}, file)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def watch_launcher(poll_seconds: float = 0.5) -> None:
    """End this process soon after torchrun, its parent, has died.

    Orphans would go on and write beside the job that replaces them. A process started by hand outlives its shell.
    """
    if not under_torchrun():
        return
    launcher = os.getppid()
    speak = os.environ.get("LOCAL_RANK", "0") == "0"  # one line a host

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(poll_seconds)
        end(f"error: the launcher (torchrun, process {launcher}) is gone: its processes end with it", 1, speak=speak)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


class _Lasting:
    """A stream whose reader may go away: what is printed then goes nowhere, and the caller goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlast_readers() -> None:
    """Let the program go on, and save, when nobody reads its output any more: `| head`, a `tee` that was killed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Lasting):  # it is None where it was closed: `>&-`
            setattr(sys, name, _Lasting(stream))
