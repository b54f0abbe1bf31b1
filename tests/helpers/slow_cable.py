"""A cable that takes its time: it carries frames between two virtual network cards late, and so many bits a second.

In user space, because few kernels bring a queue that delays. Runs on the switch; words: the first process of the host
at the other end, the port's name, the delay in seconds, the bits a second. Prints a line when both ends are there.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def card(name: str) -> int:
    """A network card whose wire is the returned file: one frame a read or write."""
    wire = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(wire, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return wire


def carry(one: int, other: int, *, delay: float, rate: float) -> None:
    """Each direction is a queue of (when to deliver, frame); a frame leaves when those before it have left."""
    queues: dict[int, collections.deque[tuple[float, bytes]]] = {one: collections.deque(), other: collections.deque()}
    free = {one: 0.0, other: 0.0}  # when the wire has sent all that it has taken in
    while True:
        due = [queue[0][0] for queue in queues.values() if queue]
        patience = max(0.0, min(due) - time.monotonic()) if due else None
        for source in select.select([one, other], [], [], patience)[0]:
            frame = os.read(source, 65536)
            free[source] = max(free[source], time.monotonic()) + 8 * len(frame) / rate
            queues[source].append((free[source] + delay, frame))
        for source, queue in queues.items():
            while queue and queue[0][0] <= time.monotonic():
                try:
                    os.write(other if source == one else one, queue.popleft()[1])
                except OSError:  # the card is down: its frames are lost
                    continue


if __name__ == "__main__":
    host, port, delay, rate = sys.argv[1:]
    ends = card("slow"), card(port)
    subprocess.run(["ip", "link", "set", "slow", "netns", host, "name", "eth0"], check=True)
    print("ready", flush=True)
    carry(*ends, delay=float(delay), rate=float(rate))
