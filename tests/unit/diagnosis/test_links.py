"""Which pairs of ranks are measured, and which of the results are worth a word."""

from __future__ import annotations

import time

from modellink_lora.diagnosis.links import MOST_PAIRED, Link, limit, link_findings, pairs_of

HOSTS = ["a", "a", "b", "b"]
GOOD = (1e-4, 1e9, True)


def link(ranks: tuple[int, int], bandwidth: float, *, right: bool = True) -> Link:
    return Link(ranks, HOSTS[ranks[0]] == HOSTS[ranks[1]], 1e-4, bandwidth, right)


def test_every_pair_of_a_few_ranks_and_every_two_hosts_of_many() -> None:
    assert pairs_of(HOSTS) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    many = [f"h{rank // 8}" for rank in range(64)]
    pairs = pairs_of(many)
    assert len(many) > MOST_PAIRED and len(pairs) < 100
    assert {(many[a], many[b]) for a, b in pairs} >= {("h0", "h7"), ("h3", "h6"), ("h2", "h2")}


def test_a_slow_link_is_slow_beside_links_of_its_kind() -> None:
    links = [link((0, 1), 9e9), link((2, 3), 10e9), link((0, 2), 1e9), link((0, 3), 0.1e9), link((1, 2), 1.1e9)]
    slow = [f for f in link_findings(links, HOSTS, GOOD, "nccl") if f.level == "warning"]
    assert [f.what for f in slow] == ["ranks 0 3"]
    assert "between hosts a and b" in slow[0].found and "1 GB/s" in slow[0].advice


def test_wrong_bytes_are_a_problem() -> None:
    found = link_findings([link((0, 1), 9e9, right=False)], HOSTS, (1e-4, 1e9, False), "hccl")
    assert [(f.what, f.level) for f in found] == [("ranks 0 1", "problem"), ("sum over all ranks, hccl", "problem")]


def test_a_block_that_hangs_is_ended_and_one_that_does_not_is_left_alone() -> None:
    ended: list[str] = []
    with limit(0.05, "these two do not talk", ended.append):
        time.sleep(0.3)
    with limit(0.2, "these two talk", ended.append):
        pass
    time.sleep(0.3)
    assert ended == ["these two do not talk"]
