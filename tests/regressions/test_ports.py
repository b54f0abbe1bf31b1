"""Ports that processes meet at, and how long their collectives wait.

Two jobs on one host: meta-pytorch/torchtune#392, xdit-project/mochi-xdit#22, NVIDIA/Megatron-LM#343. A single process
needs no port at all.
"""

from __future__ import annotations

import datetime
import socket
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modellink_lora.cli import processes
from modellink_lora.cli.launch import Launch
from modellink_lora.cli.processes import _met, joined
from modellink_lora.config.errors import UserError
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.inference.session import _gatherer
from modellink_lora.parallel.context import make_context
from modellink_lora.parallel.meeting import meet
from tests.helpers.spawn import run

ALONE = {"RANK": "0", "WORLD_SIZE": "1"}
SEVERAL = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_single_process_runs_while_its_port_is_taken(taken: int) -> None:
    environment = ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken), "MODELLINK_DEVICE": "cpu"}
    before = connections()
    with joined(Launch.from_environment(environment), device="cpu", timeout_minutes=1):
        dist.all_reduce(torch.ones(()))
        assert connections() == before, "no store listens"


def connections() -> set[int]:
    """Ports of this process that listen, gloo's own for its pairs aside, which is any free one."""
    import psutil

    return {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN
            and c.laddr.ip in ("::", "0.0.0.0")}  # fmt: skip


def test_a_single_process_may_leave_address_and_port_out() -> None:
    assert Launch.from_environment(ALONE).world_size == 1
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT not set"):
        Launch.from_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("port", ["0", "-1", "65536", "9" * 30])
def test_what_is_no_port_is_one_line(port: str) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT={port} is not a port"):
        Launch.from_environment(SEVERAL | {"MASTER_PORT": port})


def test_a_taken_port_is_one_line_for_the_first_process(taken: int) -> None:
    launch = Launch(0, 2, 0, 2, "127.0.0.1", taken)
    with pytest.raises(UserError, match=f"^MASTER_PORT={taken} is taken on this host .*: set MASTER_PORT to"):
        _met(launch, timeout_minutes=1)


def test_a_program_that_never_answers_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for the first answer of a listener without a limit."""
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(processes, "_ANSWER_SECONDS", 0.2)
        # the test goes on where a job would end: the program goes away
        monkeypatch.setattr(processes, "end", lambda line, status, *, speak: (said.append(line), hang_up(listener)))
        with pytest.raises(UserError, match="does not meet the others"):
            _met(Launch(1, 2, 1, 2, "127.0.0.1", port), timeout_minutes=0.01)  # type: ignore[arg-type]
    assert [line.partition(" answer")[0] for line in said] == [
        f"error: what listens at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} does not"
    ]


def hang_up(listener: socket.socket) -> None:
    listener.accept()[0].close()
    listener.close()


def job(port: int, ranks: range, world_size: int, *, serves: bool) -> list[Any]:
    """What each of the ranks gets: a store or an error."""
    found: list[Any] = [None] * len(ranks)

    def come(place: int, rank: int) -> None:
        try:
            found[place] = meet(address="127.0.0.1", port=port, rank=rank, world_size=world_size, attempt="0",
                                serves=serves and rank == 0, patience=10, exclusive=True)  # fmt: skip
        except UserError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("ranks", "world_size"), [(range(1, 2), 2), (range(1, 4), 4), (range(2, 4), 4)])
def test_processes_of_another_job_do_not_join_this_one(ranks: range, world_size: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    stores = job(port, range(2), 2, serves=True)
    assert all(isinstance(store, dist.PrefixStore) for store in stores)
    strangers = job(port, ranks, world_size, serves=False)
    assert any(isinstance(line, str) and f"MASTER_PORT={port} is taken by another job" in line for line in strangers)
    assert not any(isinstance(line, dist.Store) for line in strangers), "none goes on"


def timeouts() -> dict[str, datetime.timedelta]:
    """Of every group of this process but the control group of inference, which waits for people."""
    from modellink_lora.megatron.differences import process_groups

    context = make_context(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))
    before = set(dist.distributed_c10d._world.pg_names.values())
    _gatherer(context, copies=2)
    made = [g for g, name in dist.distributed_c10d._world.pg_names.items() if name not in before]
    assert process_groups()
    groups = [dist.group.WORLD, *process_groups(), *made]
    members = [g for g in groups if g is not None and g is not dist.GroupMember.NON_GROUP_MEMBER]
    return {g.group_name: g._get_backend(torch.device("cpu")).options._timeout for g in members}


def test_every_group_waits_as_long_as_the_flag_says() -> None:
    for found in run(timeouts, world_size=2):
        assert len(found) > 5 and set(found.values()) == {datetime.timedelta(minutes=2)}, (
            found
        )  # tests/helpers/spawn.py
