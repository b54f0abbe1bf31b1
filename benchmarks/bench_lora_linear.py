"""One LoRA linear in one process: processor time, operator calls, and bytes kept for backward, those of a layer too.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_lora_linear

Writes benchmarks/results/lora-linear.json. Ratios are to megatron-core's frozen linear, forward and backward. On a
processor without bf16 products those of bf16 tensors are slow: they run with fewer tokens (--bf16-part), to which all
costs of both sides are proportional.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import saved
from benchmarks.counters import Counts
from benchmarks.harness import cpu_seconds, facts, interleaved, quiet, ratios, write
from benchmarks.layers import Shape, make_case, start_alone
from benchmarks.peers import build

SHAPES = ((2048, 1024, 1024), (1024, 2048, 2048), (2048, 4096, 512))  # tokens, inputs, outputs
OURS = "L0"  # with one tensor rank nothing is sent, and there is no other level
DROPOUT = 0.1


def time_ratios(shape: Shape, names: tuple[str, ...], *, budget: float, least: int, most: int) -> dict[str, Any]:
    group = dist.group.WORLD
    cases = {name: make_case(shape, build(name, shape, group), group) for name in names}
    seconds = interleaved(
        {name: case.step for name, case in cases.items()}, cpu_seconds, budget=budget, least=least, most=most
    )
    return ratios(seconds, to="frozen")


def timings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of dtype, dropout, shape and for each peer its ratio."""
    rows = []
    for dtype, p, shapes in (
        (torch.float32, 0.0, SHAPES), (torch.float32, DROPOUT, SHAPES),
        (torch.bfloat16, 0.0, SHAPES), (torch.bfloat16, DROPOUT, SHAPES[:1]),
    ):  # fmt: skip
        narrow = dtype == torch.bfloat16
        names = ("frozen", OURS, "plain", "peft")
        names += () if p else ("merged",)
        names += ("peft fp32",) if narrow else ()
        for tokens, inputs, outputs in shapes:
            tokens = tokens // options.bf16_part if narrow else tokens
            shape = Shape("column", tokens, inputs, outputs, dropout=p, dtype=dtype)
            least, most = (3, 5) if narrow else (5, 25)
            found = time_ratios(shape, names, budget=options.budget, least=least, most=most)
            rows.append({"dtype": str(dtype).removeprefix("torch."), "p": p, "shape": [tokens, inputs, outputs],
                         "peers": found})  # fmt: skip
            told = "  ".join(f"{name} {entry['ratio']:.2f}" for name, entry in found.items())
            print(f"{rows[-1]['dtype']} p={p} {rows[-1]['shape']}: {told}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median over the shapes of each peer's ratio, and of ours to PEFT's."""
    kinds = sorted({(row["dtype"], row["p"]) for row in rows}, reverse=True)
    found = []
    for dtype, p in kinds:
        mine = [row["peers"] for row in rows if (row["dtype"], row["p"]) == (dtype, p)]
        medians = {name: statistics.median(peers[name]["ratio"] for peers in mine) for name in mine[0]}
        over = statistics.median(peers[OURS]["ratio"] / peers["peft"]["ratio"] for peers in mine)
        found.append({"dtype": dtype, "p": p, "median_ratio": medians, "ours_over_peft": over})
    return found


def operator_calls() -> dict[str, dict[str, Any]]:
    """ATen calls of one forward and backward, by peer and dropout."""
    group, found = dist.group.WORLD, {}
    for p in (0.0, DROPOUT):
        for name in ("frozen", OURS, "plain", "peft", "cclora", "merged"):
            if p and name in ("cclora", "merged"):
                continue
            shape = Shape("column", 64, 128, 128, dropout=p)
            case = make_case(shape, build(name, shape, group), group)
            case.step()
            with Counts() as counts:
                case.step()
            found.setdefault(name, {})[f"p={p}"] = {"calls": counts.calls, "kernels": dict(counts.kernels)}
    return found


def saved_bytes() -> dict[str, Any]:
    """What backward needs: by one linear, and by a decoder layer on one rank and on two."""
    found: dict[str, Any] = {"linear": {}, "layer": {}}
    start_alone("fake", 1)
    for p in (0.0, DROPOUT):
        for name in ("frozen", OURS, "plain", "peft", "peft fp32"):
            found["linear"].setdefault(name, {})[f"p={p}"] = saved.of_linear(name, p)
    found["layer"]["1"] = saved.layers(("plain", OURS, f"{OURS} recompute"), (0.0, DROPOUT))
    dist.destroy_process_group()
    start_alone("fake", 2)
    levels = ("L0 recompute", "L1 recompute", "auto", "auto recompute")
    found["layer"]["2"] = saved.layers(("plain", *levels), (0.0, DROPOUT))
    dist.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=10, help="seconds for each row of the table of times")
    parser.add_argument("--bf16-part", type=int, default=8, help="bf16 runs with this part of the tokens")
    options = parser.parse_args()
    from modellink_lora.device import get_device

    quiet()
    torch.set_num_threads(1)
    get_device("cpu").activate(0)
    begun = facts()
    start_alone()
    rows = timings(options)
    calls = operator_calls()
    dist.destroy_process_group()
    write("lora-linear", {
        "times": rows, "summary": summary(rows), "calls": calls, "saved": saved_bytes(), "bf16_part": options.bf16_part,
    }, begun)  # fmt: skip


if __name__ == "__main__":
    main()
