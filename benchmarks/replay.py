"""The critical path of a recorded program on a stated machine: one stream that computes, one link that sends.

The stream takes operations in order. A collective starts when the stream has launched it and the link is free; where
the program waits, the stream stands still until it is done. A shared link serves collectives one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.record import Event, Launch, Operation


@dataclass(frozen=True)
class Link:
    """Seconds before the first byte, bytes a second of what one rank sends in a ring."""

    latency: float
    bandwidth: float

    def seconds(self, wire: int) -> float:
        return self.latency + wire / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """Rates of one accelerator that a kernel reaches, seconds to start one, and its link."""

    name: str
    flops: float
    memory: float  # bytes a second
    kernel: float
    link: Link

    def seconds(self, operation: Operation) -> float:
        return self.kernel + max(operation.flops / self.flops, operation.traffic / self.memory)


H100_CLASS = Machine("H100-class", flops=650e12, memory=2.8e12, kernel=4e-6, link=Link(15e-6, 350e9))
A2_CLASS = Machine("A2-class", flops=250e12, memory=1.3e12, kernel=4e-6, link=Link(30e-6, 130e9))


def replay(events: Iterable[Event], seconds: Callable[[Operation], float], link: Link) -> float:
    """Seconds from the first operation to the end of the last operation or collective."""
    now = free = 0.0
    done: dict[int, float] = {}
    for event in events:
        if isinstance(event, Operation):
            now += seconds(event)
        elif isinstance(event, Launch):
            free = max(free, now) + link.seconds(event.collective.wire)
            done[event.number] = free
        else:
            now = max(now, done[event.number])
    return max(now, free)


def as_recorded(operation: Operation) -> float:
    """For `replay` of a program that was timed."""
    return operation.seconds
