"""Counters, replay and tables of the benchmarks on cases that are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.counters import Collective, Counts, Saved
from benchmarks.record import Launch, Operation, Recorder, Wait, as_16_bit
from benchmarks.replay import Link, Machine, as_recorded, replay
from benchmarks.survival import share
from benchmarks.tables import TABLES, filled
from tests.helpers.spawn import run

LINK = Link(latency=1.0, bandwidth=10.0)


def test_kernels_are_counted_and_views_and_allocations_are_not() -> None:
    x, w = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    with Counts() as counts:
        y = F.linear(x.view(3, 4), w)  # t, mm
        y.backward(torch.ones_like(y))  # ones_like; mm for each factor
        torch.empty(3).zero_()
    assert dict(counts.kernels) == {"mm": 3, "ones_like": 1, "zero_": 1}
    assert counts.calls == 5 and counts.collectives == []


def test_whole_storages_that_the_graph_holds_are_saved_once() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    w = torch.randn(4, 4, requires_grad=True)
    with Saved() as saved:
        wide = x * 2  # saves nothing that is not a number
        y = wide[:2] @ w + wide[2:4] @ w  # saves two views of one storage, and w
        forgotten = (wide * wide).detach()  # its graph is gone
    assert saved.bytes() == (6 * 4 + 4 * 4) * 4
    assert saved.bytes(without=[w.view(-1)]) == 6 * 4 * 4
    y.sum().backward()
    del y, forgotten
    assert saved.bytes() == 0


def communicate() -> dict[str, Any]:
    import torch.distributed as dist

    t, x = dist.get_world_size(), torch.ones(8, 3)
    with Counts() as counts, Recorder() as recorder:
        dist.all_gather_into_tensor(torch.empty(8 * t, 3), x)
        work = dist.reduce_scatter_tensor(torch.empty(8 // t, 3), x, async_op=True)
        x + x
        work.wait()
        dist.all_reduce(x)
        dist.all_gather([torch.empty(8, 3) for _ in range(t)], x)
    order = [e.number if isinstance(e, Launch) else "wait" if isinstance(e, Wait) else e.name for e in recorder.events]
    return {"calls": [(c.kind, c.payload, c.wire) for c in counts.collectives], "order": order}


def test_collectives_are_counted_with_the_bytes_of_a_ring() -> None:
    for found in run(communicate, world_size=2):
        part = 8 * 3 * 4
        assert found["calls"] == [
            ("all_gather", 2 * part, part), ("reduce_scatter", part, part // 2), ("all_reduce", part, part),
            ("all_gather", 2 * part, part),
        ]  # fmt: skip
        assert found["order"] == [1, "wait", 2, "add", "wait", 3, "wait", 4, "wait"]


def test_the_wire_carries_a_sum_twice_and_a_gather_once() -> None:
    assert [Collective(kind, 800, 4).wire for kind in ("all_gather", "reduce_scatter", "all_reduce")] == [
        600,
        600,
        1200,
    ]


def test_costs_of_recorded_operations() -> None:
    x, w, y = torch.ones(8, 4), torch.ones(4, 2), torch.ones(8, 2)
    with Recorder() as recorder:
        x @ w
        torch.addmm(y, x, w, beta=0)
        y.copy_(torch.ones(2).expand(8, 2))
        torch.bmm(x[None], w.expand(1, 4, 2))
    costs = [(e.name, e.flops, e.traffic) for e in recorder.events if e.name != "ones"]
    assert costs == [
        ("mm", 128, 4 * (32 + 8 + 16)), ("addmm", 128, 4 * (32 + 8 + 16)), ("copy_", 0, 4 * (2 + 16)),
        ("bmm", 128, 4 * (32 + 8 + 16)),
    ]  # fmt: skip


def operation(seconds: float) -> Operation:
    return Operation("mm", 0, 0, seconds)


def gather(number: int, seconds: float) -> Launch:
    return Launch(number, Collective("all_gather", int((seconds - LINK.latency) * LINK.bandwidth * 2), 2))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([operation(2), gather(1, 3), Wait(1), operation(2)], 7),  # nothing beside it
        ([gather(1, 3), operation(2), Wait(1), operation(2)], 5),  # 1 s stands still
        ([gather(1, 3), operation(4), Wait(1), operation(2)], 6),  # hidden
        ([gather(1, 3), gather(2, 3), operation(1), Wait(2), operation(1)], 7),  # one link: the second queues
        ([gather(1, 2), Wait(1), gather(2, 2), operation(3), Wait(2), operation(3)], 8),  # two chunks
        ([operation(1), gather(1, 5)], 6),  # nobody waits, but the step is not over
    ],
)
def test_the_critical_path(events: list[Any], expected: float) -> None:
    assert replay(events, as_recorded, LINK) == pytest.approx(expected)


def test_a_machine_takes_the_larger_of_arithmetic_and_memory() -> None:
    machine = Machine("", flops=100.0, memory=10.0, kernel=1.0, link=LINK)
    assert machine.seconds(Operation("mm", flops=500, traffic=20)) == 6
    assert machine.seconds(Operation("add", flops=0, traffic=20)) == 3


def test_a_program_in_16_bits_moves_half_the_bytes() -> None:
    events = list(as_16_bit([Operation("mm", 8, 40), Launch(1, Collective("all_gather", 80, 2)), Wait(1)]))
    assert events == [Operation("mm", 8, 20), Launch(1, Collective("all_gather", 40, 2)), Wait(1)]


def test_the_share_of_an_update() -> None:
    delta = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert share(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 5.0]), delta) == 1
    assert share(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 5.0]), delta) == pytest.approx(0.4)


def test_a_page_gets_its_tables_and_what_made_them(tmp_path: Path) -> None:
    page = "a\n<!-- table: survival -->\nold\n<!-- end -->\nb\n<!-- table: gpu-dram -->\n<!-- end -->\n"
    facts = {"date": "2026-01-02", "machine": "M", "system": "S", "versions": {"torch": "9"}, "threads": "1",
             "load": 0.1, "command": "python -m x",
             "rows": {"one rank": {"L0": {"share": 1, "branch_error": 0.002}}}}  # fmt: skip
    (tmp_path / "lora-survival.json").write_text(json.dumps(facts))
    once = filled(page, "en", tmp_path)
    assert "| one rank | L0 | 100.0% | 0.20% |" in once and "old" not in once and "`python -m x`" in once
    assert "torch 9" in once and "not measured yet" in once
    assert filled(once, "en", tmp_path) == once
    assert "单进程" in filled(page, "zh", tmp_path)


def test_the_pages_name_every_table() -> None:
    from benchmarks.tables import ENGLISH, MARKER, PAGES

    def named(page: Path) -> set[str]:
        return {match[2] for match in MARKER.finditer(page.read_text(encoding="utf-8"))}

    elsewhere = {"conversion", "decoding", "scoring"}
    assert [named(page) for page in ENGLISH] == [{"conversion"}, {"decoding"}, {"scoring"}]
    assert [named(page) for page in PAGES.values()] == [set(TABLES) - elsewhere] * 2
