"""How the other processes of this host end: the kernel tells at once, and for a moment also by which signal.

Who started them (torchrun, SLURM) collects their exit status, so it is not ours to wait for. But until it is collected,
which takes torchrun a tenth of a second, it stands in /proc/PID/stat, and a pidfd says when to look. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path


def watch_siblings(siblings: Mapping[int, str], died: Callable[[int, str | None], None]) -> None:
    """Call `died` for every sibling that ends, from a thread, with its rank and the signal that ended it, if known.

    Args:
        siblings: by rank, what `identity` was in that process. One that is not a sibling here is left out.
    """
    watched: dict[int, tuple[int, str]] = {}  # by pidfd
    for rank, said in siblings.items():
        pid = said.partition(" ")[0]
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone already, or not Linux
            descriptor = os.pidfd_open(int(pid))
            if _fields(pid)[1] == str(os.getppid()) and said == f"{pid} {_process_space()}":
                watched[descriptor] = (rank, pid)
            else:
                os.close(descriptor)
    if watched:
        threading.Thread(target=_watch, args=(watched, died), name="siblings", daemon=True).start()


def identity() -> str:
    """What tells siblings of this process which one it is: containers number their processes apart."""
    return f"{os.getpid()} {_process_space()}"


def _watch(watched: dict[int, tuple[int, str]], died: Callable[[int, str | None], None]) -> None:
    poller = select.poll()
    for descriptor in watched:
        poller.register(descriptor, select.POLLIN)
    while watched:
        ended = {descriptor: None for descriptor, _ in poller.poll()}
        # all look first: there is little time
        found = [(watched[each][0], _signal(watched[each][1])) for each in ended]
        for descriptor in ended:
            poller.unregister(descriptor)
            os.close(descriptor)
            del watched[descriptor]
        for rank, name in found:
            died(rank, name)


def _signal(pid: str) -> str | None:
    """The signal that ended a process, `SIGKILL`, or None if it ended by itself or nobody can tell any more."""
    try:
        status = int(_fields(pid)[-1])
    except (OSError, ValueError, IndexError):
        return None
    number = status & 0x7F
    try:
        return signal.Signals(number).name if number else None
    except ValueError:
        return f"signal {number}"


def _fields(pid: str) -> list[str]:
    """Of /proc/PID/stat: state, parent, ..., exit status as waitpid gives it. The name before may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _process_space() -> str:
    try:
        return f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
