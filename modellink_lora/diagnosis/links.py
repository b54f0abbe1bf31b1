"""How fast and how right the ranks talk to each other over the device's own backend: each pair, and all together."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.device import Device
from modellink_lora.diagnosis.finding import Finding

TOPIC = "links"
MOST_PAIRED = 16  # ranks of which every pair is measured; of more, neighbours and one pair of every two hosts
_BYTES = 16 * 2**20
_ROUNDS = 3
_SLOW = 0.25  # of the usual link of its kind

Guard = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Link:
    """Two ranks, and what passes between them."""

    ranks: tuple[int, int]
    inside: bool  # of one host
    seconds: float  # of a small message, one way
    bandwidth: float  # bytes a second, one way
    right: bool


def pairs_of(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of ranks to be measured."""
    size = len(hosts)
    if size <= MOST_PAIRED:
        return list(itertools.combinations(range(size), 2))
    first = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
    between = set(itertools.combinations(first.values(), 2))
    return sorted(between | {(rank, rank + 1) for rank in range(size - 1)})


def measure_pairs(device: Device, here: torch.device, hosts: Sequence[str], guard: Guard) -> list[Link]:
    """Every pair in turn, while the others wait. All ranks call it and get all links.

    Args:
        guard: a context that ends the job with the given line if its block does not end in time.
    """
    rank, mine = dist.get_rank(), []
    for one, other in pairs_of(hosts):
        line = (
            f"rank {one} on host {hosts[one]} and rank {other} on host {hosts[other]} do not reach each other over "
            f"{device.backend}: {_ADVICE[device.backend]}"
        )
        with guard(line):
            if rank in (one, other):
                seconds, right = _times(device, here, rank == one, other if rank == one else one)
                if rank == one:
                    inside = hosts[one] == hosts[other]
                    mine.append(Link((one, other), inside, seconds[0], _BYTES / seconds[1], right))
            _wait()
    everyone: list[list[Link]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted((link for links in everyone for link in links), key=lambda link: link.ranks)


def measure_all_reduce(device: Device, here: torch.device, guard: Guard) -> tuple[float, float, bool]:
    """Seconds of a small sum over all ranks, bytes a second of a large one as a ring moves them, and whether right."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with guard(f"the sum over all ranks does not end over {device.backend}: {_ADVICE[device.backend]}"):
        small, large = torch.ones(256, dtype=torch.int32, device=here), _pattern(here)
        right = True
        times: dict[str, float] = {}
        for what, tensor in (("small", small), ("large", large)):
            for _ in range(_ROUNDS):  # the best: others may be busy
                work = tensor * (rank + 1)
                _wait()
                device.synchronize()
                started = time.perf_counter()
                dist.all_reduce(work)
                device.synchronize()
                times[what] = min(times.get(what, float("inf")), time.perf_counter() - started)
                right = right and bool(torch.equal(work, tensor * (size * (size + 1) // 2)))
    return times["small"], 2 * (size - 1) / size * _BYTES / times["large"], right


def link_findings(
    links: Sequence[Link], hosts: Sequence[str], reduced: tuple[float, float, bool], backend: str
) -> list[Finding]:
    """A line for each pair, and for the sum; wrong bytes are a problem, slow links of a kind a warning."""
    result = []
    for link in links:
        one, other = link.ranks
        inside = f"on host {hosts[one]}" if link.inside else f"between hosts {hosts[one]} and {hosts[other]}"
        what, text = f"ranks {one} {other}", f"{inside}: {_speed(link.seconds, link.bandwidth)}"
        alike = [x.bandwidth for x in links if x.inside == link.inside]
        if not link.right:
            result.append(Finding(TOPIC, what, f"WRONG bytes arrive, {text}", "problem", _ADVICE[backend]))
        elif link.bandwidth < _SLOW * statistics.median(alike):
            usual = statistics.median(alike) / 1e9
            result.append(Finding(TOPIC, what, text, "warning", f"others of its kind reach {usual:.2g} GB/s: check "
                                  "this link, and who else uses it"))  # fmt: skip
        else:
            result.append(Finding(TOPIC, what, text))
    seconds, bandwidth, right = reduced
    text = f"{_speed(seconds, bandwidth)} a rank"
    if right:
        result.append(Finding(TOPIC, f"sum over all ranks, {backend}", text))
    else:
        result.append(Finding(TOPIC, f"sum over all ranks, {backend}", f"WRONG, {text}", "problem", _ADVICE[backend]))
    return result


@contextmanager
def limit(seconds: float, line: str, ended: Callable[[str], None]) -> Iterator[None]:
    """Call `ended(line)` from a thread if the block takes longer: a collective that hangs cannot be left."""
    timer = threading.Timer(seconds, ended, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_ADVICE = {
    "gloo": "name the interface in GLOO_SOCKET_IFNAME, and check firewalls",
    "nccl": "set NCCL_DEBUG=INFO to see the interface it takes, NCCL_SOCKET_IFNAME to name one, NCCL_IB_DISABLE=1 or "
            "NCCL_P2P_DISABLE=1 to leave InfiniBand or direct copies out",
    "hccl": "name the interface in HCCL_SOCKET_IFNAME, check the devices' own addresses (hccn_tool), and that all "
            "hosts have the same CANN",
}  # fmt: skip


def _times(device: Device, here: torch.device, first: bool, other: int) -> tuple[tuple[float, float], bool]:
    """((seconds of a small message, of a large one), whether all bytes came) of this process with `other`."""
    small, large = torch.ones(1, dtype=torch.int32, device=here), _pattern(here)
    best, right = [float("inf"), float("inf")], True
    for _ in range(_ROUNDS + 1):  # the first opens the connection
        for index, tensor in enumerate((small, large)):
            into = torch.empty_like(tensor)
            device.synchronize()
            started = time.perf_counter()
            if first:
                dist.send(tensor, other)
                dist.recv(into, other)
            else:
                dist.recv(into, other)
                dist.send(into, other)  # what came goes back: the first sees errors of both ways
            device.synchronize()
            best[index] = min(best[index], (time.perf_counter() - started) / 2)
            right = right and bool(torch.equal(into, tensor))
    return (best[0], best[1]), right


def _pattern(here: torch.device) -> Tensor:
    """Whole numbers: sums are exact, in whatever order."""
    return torch.arange(_BYTES // 4, dtype=torch.int32, device=here) % 8191


def _wait() -> None:
    """For all ranks, over gloo whatever the device."""
    dist.all_reduce(torch.zeros(1))


def _speed(seconds: float, bandwidth: float) -> str:
    return f"{seconds * 1e6:,.0f} us, {bandwidth / 1e9:.2g} GB/s"
