"""Whether the processes of a job find each other, before they join: who is missing, and who cannot be reached by whom.

A process group that cannot be made fails after minutes with a line about a socket; it knows no ranks and no hosts.
Here the processes meet at the job's store, tell each other where they listen, and try. Reading through the store tells
every process the verdict.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from modellink_lora.config.errors import UserError
from modellink_lora.diagnosis.finding import Finding

_PREFIX = "doctor/"
_CLOCKS_APART = 2.0  # seconds


@dataclass(frozen=True)
class Person:
    """What a process says of itself: where it runs, at what address gloo will listen, and facts to be compared."""

    host: str
    address: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Meeting:
    """All processes, by rank."""

    people: list[Person]

    @property
    def hosts(self) -> list[str]:
        return [person.host for person in self.people]

    @property
    def facts(self) -> list[dict[str, str]]:
        return [person.facts for person in self.people]


def meet(*, address: str, port: int, rank: int, world_size: int, me: Person, seconds: float) -> Meeting:
    """Wait until all ranks are at the launcher's store, and have reached each other over TCP.

    Args:
        address, port: of the store.
    Raises:
        UserError: on all ranks with the same line, naming the ranks that are missing or out of reach.
    """
    store = _store(address, port, rank, seconds)
    with _listening(me.address) as door:
        store.set(f"{_PREFIX}{rank}", json.dumps([me.host, me.address, me.facts, door]))
        said = _gather(store, "", rank, world_size, seconds, f"the store at {address}:{port}")
        people, doors = [Person(*words[:3]) for words in said], [words[3] for words in said]
        store.set(f"{_PREFIX}out-of-reach/{rank}", json.dumps(_out_of_reach(rank, people, doors, seconds)))
        tried = _gather(store, "out-of-reach/", rank, world_size, 2 * seconds + 10, "the others")
        if failed := [line for lines in tried for line in lines]:
            more = f" (and {len(failed) - 1} more pairs)" if len(failed) > 1 else ""
            raise UserError(f"{failed[0]}{more}")
    return Meeting(people)


def difference_findings(facts: Sequence[dict[str, str]], hosts: Sequence[str]) -> list[Finding]:
    """A line for each fact of which ranks say different things."""
    result = []
    for name in dict.fromkeys(name for one in facts for name in one):
        if text := unlike([one.get(name, "missing") for one in facts], hosts):
            result.append(Finding("ranks", name, f"differs: {text}", "problem", "install the same on every host"))
    return result or [Finding("ranks", "versions", f"the same on all {len(hosts)} ranks")]


def clock_finding(clocks: Sequence[float], hosts: Sequence[str]) -> Finding:
    """How far the hosts' clocks are apart, read at the same moment."""
    apart = max(clocks) - min(clocks)
    if apart < _CLOCKS_APART:
        return Finding("ranks", "clocks", f"{apart * 1000:.0f} ms apart")
    early, late = hosts[clocks.index(min(clocks))], hosts[clocks.index(max(clocks))]
    return Finding("ranks", "clocks", f"{late} is {apart:.1f} s ahead of {early}", "warning", "logs and file times "
                   "mislead: start chrony or ntpd")  # fmt: skip


def unlike(values: Sequence[str], hosts: Sequence[str]) -> str:
    """`2.13.0 on a b, 2.12.1 on c`, or nothing when all ranks have the same value."""
    if len(set(values)) == 1:
        return ""
    places: dict[str, list[str]] = {}
    for value, host in zip(values, hosts, strict=True):
        places.setdefault(value, []).append(host)
    return ", ".join(f"{value} on {' '.join(dict.fromkeys(names))}" for value, names in places.items())


def _store(address: str, port: int, rank: int, seconds: float) -> dist.Store:
    try:
        return dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False,
            timeout=datetime.timedelta(seconds=seconds),
        )  # fmt: skip
    except RuntimeError as error:  # of the network
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {rank} on host {socket.gethostname()} does not reach the job's store at {address}:{port} ({reason}"
            "): check MASTER_ADDR and MASTER_PORT, that rank 0 was started, and firewalls"
        ) from None


def _gather(store: dist.Store, name: str, rank: int, world_size: int, seconds: float, where: str) -> list[Any]:
    """What each rank wrote; rank 0 waits for all and decides, the others read what it decided."""
    verdict, read = f"{_PREFIX}{name}verdict", f"{_PREFIX}{name}read/"
    if rank == 0:
        keys = [f"{_PREFIX}{name}{other}" for other in range(world_size)]
        _until(store, keys, seconds)
        there = [store.check([key]) for key in keys]
        values = [json.loads(store.get(key)) if here else None for key, here in zip(keys, there, strict=True)]
        store.set(verdict, json.dumps(values))
        # the launcher ends the store, and all processes, once this one has ended
        _until(store, [f"{read}{other}" for other, here in enumerate(there) if here and other], seconds=10)
    else:
        try:
            store.wait([verdict], datetime.timedelta(seconds=seconds + 10))
            values = json.loads(store.get(verdict))
            store.set(f"{read}{rank}", "1")
        except RuntimeError:  # rank 0 says nothing: it is the one that is missing
            values = [None] + [[]] * (world_size - 1)
    absent = [other for other, value in enumerate(values) if value is None]
    if absent:
        came = len(values) - len(absent)
        raise UserError(
            f"rank{'s' * (len(absent) > 1)} {' '.join(map(str, absent))} of {world_size} did not come to {where} in "
            f"{seconds:g} s ({came} did): start them all, with the same MASTER_ADDR and MASTER_PORT"
        )
    return values


def _until(store: dist.Store, keys: list[str], seconds: float) -> None:
    """Wait for the keys, or so long."""
    limit = time.monotonic() + seconds
    while keys and not store.check(keys) and time.monotonic() < limit:
        time.sleep(0.05)


@contextlib.contextmanager
def _listening(address: str) -> Iterator[int]:
    """A port at `address` that accepts connections, or 0 where nothing can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as door:
        try:
            door.bind((address, 0))
            door.listen(1024)
        except OSError:
            yield 0
            return
        yield door.getsockname()[1]


def _out_of_reach(rank: int, people: Sequence[Person], doors: Sequence[int], seconds: float) -> list[str]:
    """A line for each other host's first process, and each process of this host, that does not answer."""
    me, known, lines = people[rank], set(), []
    for other, (person, door) in enumerate(zip(people, doors, strict=True)):
        if other == rank or (person.host != me.host and person.host in known):
            continue
        known.add(person.host)
        reason = "it cannot listen there"
        if door:
            try:
                socket.create_connection((person.address, door), timeout=min(seconds, 10)).close()
                continue
            except OSError as error:
                reason = error.strerror or str(error)
        lines.append(
            f"rank {rank} on host {me.host} does not reach rank {other} on host {person.host} at {person.address} "
            f"({reason}): name the interface that reaches the others in GLOO_SOCKET_IFNAME, and check firewalls"
        )
    return lines
