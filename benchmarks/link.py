"""A slow link between processes of one machine: real collectives, each padded to latency + bytes / bandwidth.

Only the wait is stretched, by sleeping, which takes no core: what a program computes between launch and wait hides the
link as it would on a real one. Collectives of one process share the link and queue up on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch._C._distributed_c10d import Work
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counters import collective_of, is_collective
from benchmarks.record import work_of
from benchmarks.replay import Link


class InjectedLink(TorchDispatchMode):
    """While it is on, collectives take as long as `link` says, or longer if they really do."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link, self._free = link, 0.0
        self._due: dict[int, tuple[Any, float]] = {}
        self._patch = patch.object(Work, "wait", _padded(self, Work.wait))

    def __enter__(self) -> InjectedLink:
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patch.stop()
        self._due.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        if is_collective(function):
            work = work_of(result)
            self._free = max(self._free, begin) + self.link.seconds(collective_of(function, args, result).wire)
            self._due[id(work)] = work, self._free
        return result

    def finish(self, work: Any) -> None:
        """Sleep until the link would have delivered."""
        _, due = self._due.pop(id(work), (None, 0.0))
        time.sleep(max(0.0, due - time.perf_counter()))


def _padded(link: InjectedLink, original: Callable[..., bool]) -> Callable[..., bool]:
    def wait(work: Any, *args: Any) -> bool:
        finished = original(work, *args)
        link.finish(work)
        return finished

    return wait
