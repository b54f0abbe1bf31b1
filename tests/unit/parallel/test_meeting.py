"""Processes that wait for each other at the job's store, and not for ever."""

from __future__ import annotations

import socket
import threading

import pytest
import torch.distributed as dist

from modellink_lora.config.errors import UserError
from modellink_lora.parallel.meeting import meet


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_all_get_one_store_when_the_last_has_come() -> None:
    port, stores = free_port(), {}

    def come(rank: int) -> None:
        stores[rank] = meet(
            address="127.0.0.1", port=port, rank=rank, world_size=3, attempt="0", serves=rank == 0, patience=20
        )

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stores[2].set("word", "heard")
    assert stores[1].get("word") == b"heard"


def test_who_has_not_come_is_named_also_beside_the_keys_of_an_earlier_attempt() -> None:
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    server.set("meeting/0/1", "")  # of the attempt before
    with pytest.raises(UserError, match=r"rank\(s\) 1 3 of 4 did not start within 1 s of rank 0"):
        server.set("meeting/1/2", "")
        meet(address="127.0.0.1", port=port, rank=0, world_size=4, attempt="1", serves=False, patience=1)
