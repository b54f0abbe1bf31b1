"""Processes that meet before they join: the missing and the unreachable are named."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from modellink_lora.config.errors import UserError
from modellink_lora.diagnosis.ranks import Meeting, Person, clock_finding, difference_findings, meet


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def attempt(**arguments: Any) -> Meeting | str:
    try:
        return meet(**arguments)
    except UserError as error:
        return str(error)


def meetings(addresses: list[str], *, world_size: int, seconds: float) -> list[Meeting | str]:
    """Each rank in a thread; those beyond `addresses` do not come."""
    port = free_port()
    launcher = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(len(addresses)) as threads:
        waiting = [
            threads.submit(
                attempt, address="127.0.0.1", port=port, rank=rank, world_size=world_size,
                me=Person(f"n{rank}", address, {"torch": f"2.{rank}"}), seconds=seconds,
            )
            for rank, address in enumerate(addresses)
        ]  # fmt: skip
        said = [one.result() for one in waiting]
    del launcher
    return said


def test_all_learn_of_all() -> None:
    for meeting in meetings(["127.0.0.1"] * 3, world_size=3, seconds=20):
        assert isinstance(meeting, Meeting)
        assert (meeting.hosts, meeting.facts[2]) == (["n0", "n1", "n2"], {"torch": "2.2"})


def test_a_rank_that_does_not_come_is_named_by_all() -> None:
    said = meetings(["127.0.0.1"] * 2, world_size=4, seconds=2)
    for line in said:
        assert isinstance(line, str) and line.startswith("ranks 2 3 of 4 did not come to the store at 127.0.0.1:")


def test_a_rank_that_cannot_be_reached_is_named_by_all() -> None:
    # 192.0.2.0/24 is for documentation: nobody has such an address, nothing listens there
    for line in meetings(["127.0.0.1", "192.0.2.1"], world_size=2, seconds=5):
        assert isinstance(line, str) and "rank 0 on host n0 does not reach rank 1 on host n1 at 192.0.2.1" in line
        assert "GLOO_SOCKET_IFNAME" in line


def test_a_store_that_is_not_there_is_an_error_that_names_it() -> None:
    port = free_port()
    with pytest.raises(UserError, match=f"rank 1 on host .* does not reach the job's store at 127.0.0.1:{port}"):
        meet(address="127.0.0.1", port=port, rank=1, world_size=2,
             me=Person("b", "127.0.0.1", {}), seconds=1)  # fmt: skip


def test_a_host_with_another_torch_is_named() -> None:
    facts = [{"torch": "2.13.0", "numpy": "2"}, {"torch": "2.13.0", "numpy": "2"}, {"torch": "2.12.1", "numpy": "2"}]
    (finding,) = difference_findings(facts, ["a", "a", "b"])
    assert (finding.what, finding.level) == ("torch", "problem")
    assert finding.found == "differs: 2.13.0 on a, 2.12.1 on b"
    assert difference_findings(facts[:2], ["a", "a"])[0].level == "ok"


def test_clocks_that_are_apart_warn() -> None:
    assert clock_finding([100.0, 100.2], ["a", "b"]).level == "ok"
    late = clock_finding([100.0, 160.0], ["a", "b"])
    assert late.level == "warning" and "b is 60.0 s ahead of a" in late.found
