"""A slow link between processes of one machine: real collectives, each padded to latency + bytes / bandwidth.

Only the wait is stretched, by sleeping, which takes no core: what a program computes between launch and wait hides the
link as it would on a real one. Collectives of one process share the link and queue up on it.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.counters import Collective, Watching
from benchmarks.replay import Link


class InjectedLink(Watching):
    """While it is on, collectives take as long as `link` says, or longer if they really do."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link, self._free = link, 0.0
        self._due: dict[int, tuple[Any, float]] = {}  # id of a Work: itself, kept so that the id stays its own; time

    def launched(self, collective: Collective, work: Any, begin: float) -> None:
        self._free = max(self._free, begin) + self.link.seconds(collective.wire)
        self._due[id(work)] = work, self._free

    def waited(self, work: Any) -> None:
        """Sleep until the link would have delivered."""
        _, due = self._due.pop(id(work), (None, 0.0))
        time.sleep(max(0.0, due - time.perf_counter()))
