"""One LoRA linear, and short steps of a layer, on one GPU against frozen weights and other projects' kernels.

    python -m benchmarks.bench_lora_gpu

bf16, random data, forward and backward, all peers in one process, a round through all of them at a time, CUDA events,
medians. Writes benchmarks/results/lora-gpu.json. `--device cpu` runs the same code on tiny shapes, to check it: its
times mean nothing and are not written.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import facts, interleaved, quiet, ratios, wall_seconds, write
from benchmarks.layers import MODELS, Case, Shape, decoder_layer, make_case, start_alone
from benchmarks.peers_gpu import FUNCTIONS, build_gpu, missing

# with one rank L1 and L2 send to themselves: their extra copies are in these numbers, their gain is not
PEERS = ("frozen", "L0", "L0 triton", "L1", "L2", "L2 triton", "plain", "peft", "peft fp32", "peft compiled",
         "unsloth", "lorafusion")  # fmt: skip
NO_DROPOUT = ("unsloth",)  # its fused function has none
RANKS, DROPOUTS, SHORT = (8, 16, 64), (0.0, 0.1), (256, 512)
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def event_seconds(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def shapes(device: str) -> dict[str, Shape]:
    """The linears to time; tiny ones where only the code is checked."""
    if device == "cpu":
        return {"tiny": Shape("column", 32, 64, 48, dtype=torch.bfloat16)}
    found = {"8192x4096x4096": Shape("column", 8192, 4096, 4096, dtype=torch.bfloat16)}
    for model, sizes in MODELS.items():
        for name, shape in decoder_layer(*sizes, tokens=4096, dtype=torch.bfloat16).items():
            found[f"{model} {name}"] = shape
    return found


def with_(shape: Shape, **changes: Any) -> Shape:
    import dataclasses

    return dataclasses.replace(shape, **changes)


def linears(options: argparse.Namespace, peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of shape, r and dropout with each peer's ratio to the frozen linear."""
    rows, group = [], dist.group.WORLD
    clock = event_seconds if options.device == "cuda" else wall_seconds
    for name, shape in shapes(options.device).items():
        for r in options.ranks:
            for p in DROPOUTS:
                this = with_(shape, rank=r, dropout=p)
                cases = {}
                for peer in peers:
                    if (p and peer in NO_DROPOUT) or (p and peer.startswith("L2") and shape.kind == "row"):
                        continue
                    cases[peer] = make_case(this, build_gpu(peer, this, group, options.device), group, options.device)
                steps = {peer: case.step for peer, case in cases.items()}
                for _ in range(options.warm_up):
                    for step in steps.values():
                        step()
                seconds = interleaved(steps, clock, budget=1e9, least=options.repetitions, most=options.repetitions)
                found = ratios(seconds, to="frozen")
                rows.append({"shape": name, "sizes": [this.tokens, this.inputs, this.outputs], "r": r, "p": p,
                             "peers": found})  # fmt: skip
                told = "  ".join(f"{peer} {entry['ratio']:.3f}" for peer, entry in found.items())
                print(f"{name} r={r} p={p}: {told}", flush=True)
    return rows


def short_steps(options: argparse.Namespace, peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """The four linears of a 7B layer at few tokens: eager, and as one CUDA graph where there is CUDA."""
    rows, group, cuda = [], dist.group.WORLD, options.device == "cuda"
    sizes = MODELS["7B"] if cuda else (64, 96, 80)
    for tokens in SHORT if cuda else (8,):
        steps: dict[str, Callable[[], object]] = {}
        for peer in peers:
            if peer == "peft compiled":
                continue  # captures graphs of its own
            layer = decoder_layer(*sizes, tokens=tokens, dtype=torch.bfloat16)
            cases = [make_case(s, build_gpu(peer, s, group, options.device), group, options.device)
                     for s in layer.values()]  # fmt: skip
            steps[f"{peer}, eager"] = whole(cases)
            if cuda:
                try:
                    steps[f"{peer}, graph"] = captured(whole(cases))
                except RuntimeError as error:
                    print(f"{peer}: not captured in a CUDA graph: {str(error).splitlines()[0]}", flush=True)
        clock = event_seconds if cuda else wall_seconds
        seconds = interleaved(steps, clock, budget=1e9, least=options.repetitions, most=options.repetitions)
        found = ratios(seconds, to="frozen, eager")
        rows.append({"tokens": tokens, "peers": found})
        print(
            f"{tokens} tokens: " + "  ".join(f"{k} {e['seconds'] * 1e6:.0f} us" for k, e in found.items()), flush=True
        )
    return rows


def whole(cases: list[Case]) -> Callable[[], None]:
    def step() -> None:
        for case in cases:
            case.step()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def dram(peers: tuple[str, ...]) -> dict[str, Any]:
    """GiB that one step of 8192x4096x4096 moves, by NVIDIA's profiler; the reason where it does not run."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"skipped": "ncu was not found"}
    found: dict[str, Any] = {}
    for p in DROPOUTS:
        for peer in peers:
            if peer == "peft compiled" or (p and peer in NO_DROPOUT):
                continue
            program = [sys.executable, "-m", "benchmarks.bench_lora_gpu", "--profile", peer, "--dropout", str(p)]
            command = [ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS), *program]
            done = subprocess.run(command, capture_output=True, text=True)
            total = dram_bytes(done.stdout)
            found[f"{peer}, p={p}"] = total / 2**30 if total else f"ncu: {done.stdout.strip().splitlines()[-1:]}"
            print(f"DRAM {peer} p={p}: {found[f'{peer}, p={p}']}", flush=True)
    return found


def dram_bytes(output: str) -> float:
    """Sum of the metrics over all kernels in ncu's csv, in bytes."""
    units = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    table = "\n".join(line for line in output.splitlines() if line.startswith('"'))
    return sum(
        float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"]]
        for row in csv.DictReader(io.StringIO(table)) if row.get("Metric Name") in METRICS
    )  # fmt: skip


def profile(peer: str, p: float) -> None:
    """One step between the profiler's marks."""
    shape = with_(shapes("cuda")["8192x4096x4096"], dropout=p)
    case = make_case(shape, build_gpu(peer, shape, dist.group.WORLD, "cuda"), dist.group.WORLD, "cuda")
    for _ in range(3):
        case.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    case.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=5, help="rounds before the first that counts")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="r of the adapters")
    parser.add_argument("--profile", metavar="PEER", help=argparse.SUPPRESS)  # what ncu is started around
    parser.add_argument("--dropout", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device here; nothing was measured (--device cpu only checks the code)")
        return
    from modellink_lora.device import get_device

    quiet()
    get_device(options.device).activate(0)
    start_alone("nccl" if options.device == "cuda" else "gloo")
    if options.profile:
        profile(options.profile, options.dropout)
        return
    begun = facts()
    absent = {name: reason for name in FUNCTIONS if (reason := missing(name))}
    for name, reason in absent.items():
        print(f"left out, {name}: {reason}", flush=True)
    cuda = options.device == "cuda"
    peers = tuple(p for p in PEERS if p not in absent and (cuda or p.split()[-1] not in ("compiled", "triton")))
    result = {"linears": linears(options, peers), "short": short_steps(options, peers), "absent": absent}
    if cuda:
        write("lora-gpu", {**result, "dram": dram(peers)}, begun)
    else:
        print("the code ran; times on a CPU mean nothing here and are not written")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
