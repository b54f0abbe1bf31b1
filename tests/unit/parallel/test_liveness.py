"""What a process says that was asked to stop because another of its host has died."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from modellink_lora.parallel.liveness import Liveness, Timing

Said = list[tuple[str, int, bool]]


@pytest.fixture
def peers() -> Iterator[tuple[Liveness, Said]]:
    """The heartbeat of a job of one process, and how it would end that process."""
    store, said = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), list[tuple[str, int, bool]]()
    ended: Any = lambda *words: said.append(words)  # noqa: E731
    made = Liveness(
        meeting=dist.PrefixStore("job", store), address="127.0.0.1", port=store.port, rank=0, world_size=1,
        local_rank=0, local_world_size=1, host="n1", ended=ended, timing=Timing(beat=0.05),
    )  # fmt: skip
    yield made, said
    made.leave()


def test_without_a_loss_nobody_is_blamed(peers: tuple[Liveness, Said]) -> None:
    heartbeat, said = peers
    heartbeat.blame_sibling()
    assert said == []


def test_a_sibling_whose_status_was_collected_already_is_named_all_the_same(peers: tuple[Liveness, Said]) -> None:
    heartbeat, said = peers
    heartbeat._sibling_ended(3, None)
    assert said == [], "it may have given its reason itself"
    heartbeat.blame_sibling()
    line = "error: rank 3 on host n1 is gone: its launcher knows how it ended; the job ends"
    assert said == [(line, 1, True)]


def test_the_first_reason_of_a_job_stays(peers: tuple[Liveness, Said]) -> None:
    heartbeat, said = peers
    assert heartbeat.say("rank 1 on host n1: error: bad input")
    heartbeat._sibling_ended(1, None)
    heartbeat.blame_sibling()
    assert [speaks for *_, speaks in said] == [False]


def test_the_one_who_found_out_speaks_whichever_of_its_threads_is_first(peers: tuple[Liveness, Said]) -> None:
    """The heartbeat's thread may read the verdict back before the thread that wrote it goes on."""
    heartbeat, said = peers
    heartbeat._sibling_ended(1, "SIGKILL")
    limit = time.monotonic() + 30
    while len(said) < 3 and time.monotonic() < limit:  # one by this thread, others by the heartbeat's
        time.sleep(0.01)
    assert set(said) == {("error: rank 1 on host n1 is gone: ended by SIGKILL; the job ends", 1, True)}


def test_a_sibling_that_found_the_same_a_moment_earlier_has_said_it(peers: tuple[Liveness, Said]) -> None:
    heartbeat, said = peers
    heartbeat._store.set(heartbeat._verdict, "0 2\nerror: rank 1 on host n1 is gone: ended by SIGKILL; the job ends")
    heartbeat._sibling_ended(1, "SIGKILL")
    heartbeat.blame_sibling()
    assert said and not any(speaks for *_, speaks in said)
