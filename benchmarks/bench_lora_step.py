"""The four LoRA linears of a decoder layer over tensor-parallel ranks: what is sent, and how long a step takes.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_lora_step

Writes benchmarks/results/lora-<part>.json:
    counted    collectives and bytes of one micro-batch, on real gloo processes.
    replay     critical path at the sizes of 7B and 70B models on stated accelerators, from the recorded programs.
    measured   wall time on gloo processes behind an injected link, beside the replay of what was recorded there.
    survival   share of a small update that bf16 keeps.
Everything is forward and backward of one micro-batch, and relative to megatron-core's serial frozen layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.counters import Counts
from benchmarks.harness import facts, interleaved, quiet, ratios, wall_seconds, write
from benchmarks.layers import MODELS, Case, Shape, decoder_layer, make_case, start_alone
from benchmarks.link import InjectedLink
from benchmarks.peers import build
from benchmarks.record import Event, Launch, Operation, Wait, as_16_bit, record, without_data
from benchmarks.replay import A2_CLASS, H100_CLASS, Link, as_recorded, replay
from benchmarks.survival import mean, survival

PEERS = ("frozen", "plain", "cclora", "merged")
OURS = {  # levels and chunks, by whether there is sequence parallelism; "L2/L0" is what auto chooses in 16 bits
    True: ("L0", "L1", "L2", "L2/L0", "L0 c2", "L1 c2", "L2 c2", "L2/L0 c2", "L0 c4", "L1 c4", "L2 c4", "L2/L0 c4"),
    False: ("L0", "L0 c2", "L0 c4"),
}
LINKS = (Link(2e-3, 300e6), Link(5e-3, 100e6))
SMALL = (1024, 3072, 2816)  # hidden, qkv rows, MLP width of the measured layer
MEASURED = ("frozen", "plain", "cclora", "L0", "L1", "L2", "L2/L0", "L2 c2", "L2 c4", "L2/L0 c2", "L2/L0 c4")


def layer_cases(name: str, sizes: tuple[int, int, int], tokens: int, sp: bool) -> list[Case]:
    """A peer's four linears on this rank, each with an input of its own, in fp32."""
    return cases_of(name, decoder_layer(*sizes, tokens=tokens, sequence_parallel=sp).values())


def cases_of(name: str, shapes: Iterable[Shape]) -> list[Case]:
    group = dist.group.WORLD
    return [make_case(shape, build(name, shape, group), group) for shape in shapes]


def step_of(cases: list[Case]) -> Callable[[], None]:
    """Forward and backward of each linear in turn: they wait for each other, as in a model."""

    def step() -> None:
        for case in cases:
            case.step()

    return step


# ---- counted


def count(names: tuple[str, ...], sp: bool, tokens: int) -> dict[str, dict[str, Any]]:
    """On each of real processes: collectives by kind, and bytes sent, of one micro-batch in bf16.

    What is sent is as wide as the model, 4096; the linears' other dimension is not sent, and small.
    """
    common = dict(tokens=tokens, dtype=torch.bfloat16, sequence_parallel=sp)
    pair = (Shape("column", inputs=4096, outputs=64, **common), Shape("row", inputs=64, outputs=4096, **common))
    found = {}
    for name in names:
        with Counts() as counts:
            for case in cases_of(name, pair * 2):
                case.step()
        found[name] = {"kinds": counts.by_kind, "calls": len(counts.collectives), "wire": counts.wire}
    return found


def counted(tokens: int) -> list[dict[str, Any]]:
    from tests.helpers.spawn import run

    rows = []
    for t in (2, 4):
        for sp in (True, False):
            names = (*PEERS, *(("L0", "L1", "L2", "L2/L0", "L2 c2") if sp else ("L0", "L0 c2")))
            ranks = run(count, world_size=t, names=names, sp=sp, tokens=tokens)
            assert all(rank == ranks[0] for rank in ranks), "every rank sends the same"
            frozen = ranks[0]["frozen"]
            for name, entry in ranks[0].items():
                chunks = int(name[-1]) if " c" in name else 1  # a chunked collective is one collective
                rows.append({
                    "tp": t, "sp": sp, "peer": name, **entry, "chunks": chunks,
                    "owned": entry["calls"] - frozen["calls"] if chunks == 1 else None,
                    "bytes_over_base": entry["wire"] / frozen["wire"] - 1,
                })  # fmt: skip
                print(f"TP{t} {'SP' if sp else 'no SP'} {name}: {rows[-1]}", flush=True)
    return rows


# ---- replay of 7B and 70B


def program(name: str, sizes: tuple[int, int, int], tokens: int, sp: bool) -> list[Event]:
    """What one rank of a group that does not exist would do, in 16 bits."""
    with without_data():
        cases = layer_cases(name, sizes, tokens, sp)
        return [event for case in cases for event in numbered(as_16_bit(record(case.step)), case)]


def numbered(events: Any, case: Case) -> list[Event]:
    """Collectives of each case get numbers of their own."""
    key = id(case) * 1000
    return [
        event if isinstance(event, Operation)
        else Launch(key + event.number, event.collective) if isinstance(event, Launch) else Wait(key + event.number)
        for event in events
    ]  # fmt: skip


def replayed(tokens: int = 4096) -> list[dict[str, Any]]:
    """Rows of model, TP size, SP, machine and peer: seconds and ratio to the frozen layer."""
    rows = []
    for t in (2, 4, 8):
        start_alone("fake", t)
        for model, sizes in MODELS.items():
            for sp in (True, False):
                names = (*PEERS, *OURS[sp])
                programs = {name: program(name, sizes, tokens, sp) for name in names}
                for machine in (H100_CLASS, A2_CLASS):
                    seconds = {name: replay(events, machine.seconds, machine.link) for name, events in programs.items()}
                    ratio = {name: value / seconds["frozen"] for name, value in seconds.items()}
                    rows.append({"model": model, "tp": t, "sp": sp, "machine": machine.name,
                                 "frozen_us": seconds["frozen"] * 1e6, "ratio": ratio})  # fmt: skip
                    told = "  ".join(f"{name} {value:.2f}" for name, value in ratio.items())
                    print(f"{model} TP{t} {'SP' if sp else 'no SP'} {machine.name}: {told}", flush=True)
        dist.destroy_process_group()
    return rows


# ---- measured behind an injected link


def behind_link(names: tuple[str, ...], link: Link, tokens: int, rounds: int) -> dict[str, Any]:
    """On each of real processes: wall seconds in interleaved rounds, and the replay of what was recorded."""
    cases = {name: layer_cases(name, SMALL, tokens, True) for name in names}
    steps = {name: step_of(case) for name, case in cases.items()}

    def clock(step: Callable[[], object]) -> float:
        dist.barrier()
        with InjectedLink(link):
            return wall_seconds(step)

    seconds = interleaved(steps, clock, budget=1e9, least=rounds, most=rounds)
    recordings: dict[str, list[list[Event]]] = {name: [] for name in names}
    for _ in range(max(3, rounds // 2)):
        for name, step in steps.items():
            dist.barrier()
            recordings[name].append(record(step))
    return {
        "seconds": seconds,
        "replay": {name: replay(quickest(recordings[name]), as_recorded, link) for name in names},
    }


def quickest(recordings: list[list[Event]]) -> list[Event]:
    """One recording, in which every operation took the least of its times: what else the machine did is left out."""
    return [
        replace(same[0], seconds=min(other.seconds for other in same)) if isinstance(same[0], Operation) else same[0]
        for same in zip(*recordings, strict=True)
    ]


def measured(tokens: int, rounds: int) -> list[dict[str, Any]]:
    from tests.helpers.spawn import run

    rows = []
    for link in LINKS:
        ranks = run(behind_link, world_size=2, names=MEASURED, link=link, tokens=tokens, rounds=rounds)
        slowest = {name: [max(times) for times in zip(*(rank["seconds"][name] for rank in ranks))] for name in MEASURED}
        replays = {name: max(rank["replay"][name] for rank in ranks) for name in MEASURED}
        found = ratios(slowest, to="frozen")
        for name, entry in found.items():
            entry["replay_seconds"] = replays[name]
            entry["replay_ratio"] = replays[name] / replays["frozen"]
            print(f"{link}: {name} {entry['ratio']:.2f}, replay {entry['replay_ratio']:.2f}", flush=True)
        rows.append({"link": asdict(link), "tokens": tokens, "sizes": SMALL, "peers": found})
    return rows


def survived() -> dict[str, Any]:
    """Share of a small update that bf16 keeps: one rank, and column and row linears at TP2 under SP."""
    from tests.helpers.spawn import run

    common = dict(tokens=1024, width=1024)
    found = {"one rank": mean(run(survival, world_size=1, kind="column", **common,
                                  names=("plain", "L0", "merged", "peft", "peft fp32")))}  # fmt: skip
    for kind in ("column", "row"):
        names = ("plain", "L0", "L1", "L2", "cclora", "merged")
        found[f"{kind}, TP2 SP"] = mean(run(survival, world_size=2, kind=kind, names=names, **common))
    for place, peers in found.items():
        told = "  ".join(f"{name} {e['share']:.1%} ({e['branch_error']:.2%})" for name, e in peers.items())
        print(f"{place}, share of the update (error of the branch): {told}", flush=True)
    return found


PARTS = {"counted": lambda o: counted(o.count_tokens), "replay": lambda o: replayed(),
         "measured": lambda o: measured(o.tokens, o.rounds), "survival": lambda o: survived()}  # fmt: skip


def main() -> None:
    from modellink_lora.device import get_device
    from tests.helpers.spawn import close_all

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of the measured steps, interleaved")
    parser.add_argument("--tokens", type=int, default=2048, help="of the measured steps")
    parser.add_argument("--count-tokens", type=int, default=256, help="of the counted steps; bytes are proportional")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    get_device("cpu").activate(0)
    begun = facts()
    for part in options.parts:
        write(f"lora-{part}", {"rows": PARTS[part](options)}, begun)
    close_all()


if __name__ == "__main__":
    main()
