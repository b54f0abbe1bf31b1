"""Which processes of a job are alive: a heartbeat over the job's own store, and the last words of a failing process.

A process that dies takes its peers' collectives with it: over gloo they fail with a line about a socket, over NCCL and
HCCL they hang. A thread of every process therefore tells the store every few seconds that it is there; rank 0 watches
all, everybody watches rank 0. Who finds a rank silent, or fails itself, writes the verdict; all others read it within
a beat, and end although their main thread hangs. The thread has a connection of its own (a client of the store serves
one call at a time) and no collective is used: it begins before there is a process group, while libraries are loaded.
Traffic is two calls per rank and beat.
"""

from __future__ import annotations

import datetime
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from modellink_lora.parallel.siblings import identity, watch_siblings

_LAUNCHER_SECONDS = 2.0  # a launcher's death closes the store too; who watches the launcher has the better line
LEFT = "left"  # instead of a beat: this rank has finished its work


@dataclass(frozen=True)
class Timing:
    """Seconds. A silence is counted in looks, so that a process that was stopped itself accuses nobody."""

    beat: float = 2.0
    patience: float = 40.0  # silence after which a rank is gone
    alarmed: float = 10.0  # the same once a connection broke or SIGTERM came: then somebody probably is gone

    @property
    def linger(self) -> float:
        """How long a process that knows the verdict stays: others may read it from a store that it keeps alive."""
        return 1.5 * self.beat

    @property
    def verdict(self) -> float:
        """Within how long an alarm leads to a verdict if somebody is gone."""
        return self.alarmed + 3 * self.beat + 2.0


class Liveness:
    """Begins once the processes have met; all of them must make one.

    Args:
        meeting: the store that the processes met at, by keys of this start of them.
        address, port: of that store.
        local_rank, local_world_size: among the processes of this host, whose ranks follow each other.
        ended: called as (line, status, speak) to end this process, from a thread; it must not return.
    """

    def __init__(
        self,
        *,
        meeting: dist.Store,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        local_rank: int,
        local_world_size: int,
        host: str,
        ended: Callable[[str, int, bool], NoReturn],
        timing: Timing,
    ) -> None:
        self.rank, self.host, self.timing = rank, host, timing
        self._ended = ended
        # one process of each host tells what was found on another; of the store's end, which is mostly rank 0's own
        # and cannot be agreed upon, somebody else tells on rank 0's host
        self._node, self._speaks = str(rank - local_rank), local_rank == 0
        self._author = f"{self._node} {rank}"  # before a verdict of this process
        self._speaks_of_store = local_rank == (1 if self._node == "0" else 0)
        self._store = dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=timing.patience)
        )
        # a job that torchrun starts anew finds the keys of the old one in the store: each start has its own name
        start: list[str] = [uuid.uuid4().hex, host]
        if rank == 0:
            self._name(start[0], world_size)
            keys = [self._verdict, self._alarm, *self._beats]
            self._store.multi_set(keys, ["", "", *["0 ?"] * world_size])  # type: ignore[attr-defined]
            meeting.set("heartbeat", " ".join(start))
        start = meeting.get("heartbeat").decode().split(" ", 1)
        self._name(start[0], world_size)
        self._store_lost = (
            f"error: rank 0 on host {start[1]} or its launcher is gone: the job's store at {address}:{port} "
        )
        self._rounds = 0  # finished exchanges with the store
        self._looked = 0.0  # when the beats of others were last looked at
        self._values: dict[int, str] = {}  # what was read then, by rank, and for how many looks it has stood
        self._silent: dict[int, int] = {}
        self._known = ""  # why a sibling has ended
        self._lost = ""  # that it has, also where nobody could see why
        self._spoken = False  # this process has its own reason to end
        self._wish: tuple[str, str] | None = None  # (key, value) that another thread wants written
        self._wished, self._written = threading.Lock(), threading.Event()
        self._first = True
        self._wake = threading.Event()
        self._closing = self._leaving = False
        first = rank - local_rank
        siblings = self._identities(start[0], range(first, min(first + local_world_size, world_size)))
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        watch_siblings(siblings, self._sibling_ended)
        threading.Thread(target=self._guard, name="heartbeat guard", daemon=True).start()

    def alarm(self) -> None:
        """Something broke: whoever is silent for `timing.alarmed` is gone."""
        self._write(self._alarm, "1")

    def end(self, line: str, status: int, *, trace: str = "") -> NoReturn:
        """Tell the others why this process ends, and end. Prints nothing if a reason has been given already.

        Args:
            trace: printed before the line, on this host only.
        """
        who = f"rank {self.rank} on host {self.host}: {line}"
        first = self.say(who)
        self._ended(trace + (line if self.rank == 0 else who), status, first)

    def blame_sibling(self) -> None:
        """End this process in the name of one of this host that is gone, if one is, and nobody has given a reason."""
        if self._lost:
            self._spoken = True
            self._ended(self._lost, 1, self._write(self._verdict, f"{self._author}\n{self._lost}"))

    def say(self, line: str) -> bool:
        """Write the verdict, if there is none; whether this was the first, or the store does not answer."""
        self._spoken = True
        return self._write(self._verdict, f"{self._author}\n{line}")

    def leave(self) -> None:
        """The work is done here. Rank 0, which may hold the store, waits for the others, dead ones excepted."""
        self._closing = True
        self._leaving = self.rank != 0
        self._wake.set()
        self._thread.join(self.timing.patience if self.rank else None)

    def _identities(self, start: str, ranks: Sequence[int]) -> dict[int, str]:
        """Which processes the other ranks of this host are."""
        keys = {each: f"liveness/{start}/process/{each}" for each in ranks}
        self._store.set(keys.pop(self.rank), identity())
        return {each: self._store.get(key).decode() for each, key in keys.items()}

    def _sibling_ended(self, rank: int, by: str | None) -> None:
        """Tell why at once if a signal ended it. Else it has told itself, or its silence will."""
        if self._closing:
            return
        how = f"ended by {by}" if by else "its launcher knows how it ended"
        self._lost = f"error: rank {rank} on host {self.host} is gone: {how}; the job ends"
        if by is None:
            return
        self._known = self._lost
        if not self._spoken and self._write(self._verdict, f"{self._author}\n{self._known}"):
            self._ended(self._known, 1, True)

    def _name(self, start: str, world_size: int) -> None:
        self._verdict, self._alarm = (f"liveness/{start}/{key}" for key in ("verdict", "alarm"))
        self._beats = [f"liveness/{start}/beat/{rank}" for rank in range(world_size)]

    def _write(self, key: str, value: str) -> bool:
        """Have the heartbeat's thread write, whose connection it is; True also when it cannot."""
        with self._wished:
            self._written.clear()
            self._first = True
            self._wish = (key, value)
            self._wake.set()
            self._written.wait(2 * self.timing.beat + 2.0)
            return self._first

    def _beat(self) -> None:
        try:
            while self._round():
                self._wake.wait(0.1 if self._closing else self.timing.beat)
                self._wake.clear()
        except RuntimeError as error:  # of the store: the connection is closed
            if not self._leaving:
                time.sleep(_LAUNCHER_SECONDS)
                closed = f"{self._store_lost}has closed ({str(error).splitlines()[0]})"
                self._ended(self._known or closed, 1, self._speaks_of_store)

    def _round(self) -> bool:
        """One exchange with the store; False when it was the last."""
        wish, leaving = self._wish, self._leaving
        if wish:
            self._first = self._store.compare_set(wish[0], "", wish[1]).decode() == wish[1]
            self._wish = None
            self._written.set()
        self._store.set(self._beats[self.rank], f"{LEFT if leaving else self._rounds} {self.host}")
        watched = range(len(self._beats)) if self.rank == 0 else (0,)
        read = self._store.multi_get([self._verdict, self._alarm, *(self._beats[rank] for rank in watched)])
        verdict, alarm, *beats = (value.decode() for value in read)
        self._rounds += 1
        if leaving:
            return False
        if verdict and not self._spoken:
            self._obey(verdict)
        values = dict(zip(watched, beats, strict=True))
        if not self._spoken and time.monotonic() - self._looked >= 0.9 * self.timing.beat:
            self._judge(values, self.timing.alarmed if alarm else self.timing.patience)
        if self._closing:  # rank 0 only: the others leave at once
            self._leaving = all(value.startswith(LEFT) for rank, value in values.items() if rank)
        return True

    def _judge(self, values: dict[int, str], patience: float) -> None:
        """Count silent looks, and say who is gone. A host's processes fall silent together, within two looks."""
        for rank, value in values.items():
            same = rank != self.rank and value == self._values.get(rank) and not value.startswith(LEFT)
            self._silent[rank] = self._silent.get(rank, 0) + 1 if same else 0
        self._values, self._looked = values, time.monotonic()
        looks = math.ceil(patience / self.timing.beat)
        if max(self._silent.values()) < looks:
            return
        gone = [rank for rank, silent in self._silent.items() if silent >= max(1, looks - 2)]
        line = f"error: {_names(gone, values)}: no sign of life for {patience:g} s; the job ends"
        self._obey(self._store.compare_set(self._verdict, "", f"{self._author}\n{line}").decode())

    def _obey(self, verdict: str) -> None:
        """End this process. One process of each host says why: the one that found out, or the first of another host.

        Its own verdict comes here too: the heartbeat's thread may read it before the thread that wished it goes on.
        """
        author, line = verdict.split("\n", 1)
        elsewhere = author.split(" ")[0] != self._node
        self._ended(line, 1, author == self._author or (self._speaks and elsewhere))

    def _guard(self) -> None:
        """A store whose host has vanished neither answers nor closes: the heartbeat's thread then hangs in a call."""
        seen, still = -1, 0
        while still * self.timing.beat < self.timing.patience:
            time.sleep(self.timing.beat)
            if self._leaving:
                return
            still = still + 1 if self._rounds == seen else 0
            seen = self._rounds
        self._ended(f"{self._store_lost}has not answered for {self.timing.patience:g} s", 1, self._speaks_of_store)


def _names(ranks: Sequence[int], beats: dict[int, str]) -> str:
    """`rank 3 on host a is gone`, or `ranks 8 9 on host a, rank 16 on host b are gone`."""
    hosts: dict[str, list[int]] = {}
    for rank in ranks:
        hosts.setdefault(beats[rank].split(" ", 1)[1], []).append(rank)
    parts = [f"rank{'s' * (len(r) > 1)} {' '.join(map(str, r))} on host {host}" for host, r in hosts.items()]
    return f"{', '.join(parts)} {'is' if len(ranks) == 1 else 'are'} gone"
