"""Which ranks can read each other's memory: what they told each other, and what follows from it."""

from __future__ import annotations

from modellink_lora.device.symmetric_memory import Peer, peer_limits

BOTH = frozenset({0, 1})


def test_two_gpus_of_one_host_that_reach_each_other_have_no_limit() -> None:
    assert peer_limits([Peer("a", 0, BOTH), Peer("a", 1, BOTH)]) == ()


def test_each_obstacle_between_two_ranks_is_named() -> None:
    obstacles = {
        "the group's ranks are on several hosts": [Peer("a", 0, BOTH), Peer("b", 1, BOTH)],
        "ranks share a GPU index; each process must see all GPUs of the host": [Peer("a", 0, BOTH), Peer("a", 0, BOTH)],
        "not every GPU of the group reaches the memory of the others": [
            Peer("a", 0, BOTH),
            Peer("a", 1, frozenset({1})),
        ],
        "the group has one rank": [Peer("a", 0, BOTH)],
    }
    for reason, peers in obstacles.items():
        assert peer_limits(peers) == (reason,)
