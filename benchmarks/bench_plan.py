"""Predictions of the planner against measured CPU runs of one and two processes: step time, memory, ranking.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_plan

Calibrates first, then trains a model of random weights on each layout. A round goes through all layouts, so that what
else the machine does falls on all alike; the fastest step of all rounds counts. Memory is that of an allocation
tracker. Writes benchmarks/results/plan-cpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

RESULT = Path(__file__).parent / "results" / "plan-cpu.md"
MODEL = dict(
    num_layers=8, hidden_size=768, num_attention_heads=12, num_query_groups=4, ffn_hidden_size=2048,
    max_position_embeddings=2048, vocab_size=8000, normalization="RMSNorm", swiglu=True,
    position_embedding_type="rope", untie_embeddings_and_output_weights=True,
)  # fmt: skip
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LENGTH, BATCH, RANK = 128, 8, 16
NOISE = 0.1  # a smaller measured difference ranks nothing
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
HALF = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4}
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {  # processes: name: (parallel, train)
    1: {
        "micro batch 1": ({}, {"micro_batch_size": 1}),
        "micro batch 4": ({}, {"micro_batch_size": 4}),
        "micro batch 4, half recomputed": ({}, {"micro_batch_size": 4, **HALF}),
        "micro batch 4, recomputed": ({}, {"micro_batch_size": 4, **FULL}),
    },
    2: {
        "DP2, micro batch 1": ({}, {"micro_batch_size": 1}),
        "DP2, micro batch 4": ({}, {"micro_batch_size": 4}),
        "DP2, micro batch 4, shared optimizer": ({}, {"micro_batch_size": 4, "use_distributed_optimizer": True}),
        "TP2, micro batch 1": (TP2, {"micro_batch_size": 1}),
        "TP2, micro batch 4": (TP2, {"micro_batch_size": 4}),
        "TP2 SP, micro batch 4": ({**TP2, "sequence_parallel": True}, {"micro_batch_size": 4}),
        "PP2, micro batch 1": (PP2, {"micro_batch_size": 1}),
        "PP2, micro batch 4": (PP2, {"micro_batch_size": 4}),
        "PP2 x 2 chunks, micro batch 1": (
            {**PP2, "num_layers_per_virtual_pipeline_stage": 2}, {"micro_batch_size": 1},
        ),
    },
}  # fmt: skip


def train(*, folder: str, parallel: dict[str, Any], train: dict[str, Any], steps: int, track: bool) -> dict[str, Any]:
    """Seconds of each step on this rank; with `track`, tracked peak bytes of the last one instead."""
    import torch.distributed as dist

    from modellink_lora.training import loop
    from tests.helpers.allocations import Allocations
    from tests.helpers.training import fine_tune_here, train_flags, write_corpus

    prefix = Path(folder) / f"corpus{dist.get_rank()}"
    write_corpus(prefix)
    tracker = Allocations()
    seconds, original = [], loop.train_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        tracker.reset_peak()
        dist.barrier()
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
        return result

    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, patch.object(loop, "train_step", timed), tracker if track else contextlib.nullcontext():
        fine_tune_here(
            train=train_flags(train_iters=steps, global_batch_size=BATCH, **train),
            data=dict(data_path=(str(prefix),), seq_length=LENGTH, variable_seq_lengths=False),
            parallel=parallel, lora={"r": RANK, "target_modules": TARGETS}, model=MODEL,
        )  # fmt: skip
    return {"seconds": seconds[1:], "peak": tracker.peak}


def predicted(parallel: dict[str, Any], train: dict[str, Any], processes: int, machine: Any) -> tuple[Any, list[int]]:
    """Time of a step, and bytes on each rank."""
    from modellink_lora.adapters.targets import adapted_linears
    from modellink_lora.config.adapter import LoraConfig
    from modellink_lora.config.model import ModelConfig
    from modellink_lora.models.families import family_of
    from modellink_lora.parallel.partition import Partition
    from modellink_lora.planning.cost import step_time
    from modellink_lora.planning.memory import Plan, rank_memory

    model = ModelConfig(**MODEL)  # type: ignore[arg-type]
    linears = adapted_linears(family_of("llama"), model, LoraConfig(r=RANK, target_modules=TARGETS))
    tp, pp = parallel.get("tensor_model_parallel_size", 1), parallel.get("pipeline_model_parallel_size", 1)
    dp = processes // tp // pp
    layers = parallel.get("num_layers_per_virtual_pipeline_stage")
    settings = {key: value for key, value in train.items() if key.startswith("recompute")}
    plan = Plan(
        model=model, partition=Partition.of(model.num_layers, pp, None, layers), tp=tp, dp=dp,
        sequence_parallel=parallel.get("sequence_parallel", False), micro_batch_size=train["micro_batch_size"],
        length=LENGTH, micro_batches=BATCH // dp // train["micro_batch_size"], dtype="fp32", adapter_dtype="fp32",
        distributed_optimizer=train.get("use_distributed_optimizer", False), **settings,
    )  # fmt: skip
    stages = [rank_memory(plan, linears, stage=rank // (tp * dp))["total"] for rank in range(processes)]
    return step_time(plan, dict.fromkeys(TARGETS, RANK), machine), stages


def main() -> None:
    from modellink_lora.planning.calibrate import calibrate
    from tests.helpers.spawn import close_all, run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each round; the first warms up")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    lines, rates, load = [], [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            layouts = LAYOUTS[processes]
            machine = _best([calibrate("cpu", "fp32", processes, threads=1)[0] for _ in range(3)])
            rates.append(
                f"- {processes} processes: matrix products {machine.matmul / 1e9:.1f} GFLOP/s, attention "
                f"{machine.attention / 1e9:.1f} GFLOP/s, element-wise {machine.stream / 1e9:.1f} GB/s, operator "
                f"{machine.operator * 1e6:.1f} us"
                + (f", collective {machine.inside.latency * 1e6:.0f} us and {machine.inside.bandwidth / 1e9:.2f} GB/s"
                   if processes > 1 else "")
            )  # fmt: skip
            print(rates[-1], flush=True)
            measured: dict[str, float] = dict.fromkeys(layouts, float("inf"))
            for number in range(options.rounds):
                for name, (parallel, settings) in layouts.items():
                    common = dict(folder=folder, parallel=parallel, train=settings, world_size=processes)
                    ranks = run(train, steps=options.steps, track=False, **common)
                    measured[name] = min(measured[name], *ranks[0]["seconds"])
                    print(f"round {number + 1}, {name}: {min(ranks[0]['seconds']):.3f} s", flush=True)
            guesses, worst = {}, []
            for name, (parallel, settings) in layouts.items():
                ranks = run(train, steps=2, track=True, folder=folder, parallel=parallel, train=settings,
                            world_size=processes)  # fmt: skip
                guess, memory = predicted(parallel, settings, processes, machine)
                guesses[name] = guess.total
                off = max((m / rank["peak"] - 1 for m, rank in zip(memory, ranks, strict=True)), key=abs)
                worst.append(off)
                peak = max(rank["peak"] for rank in ranks)
                parts = ", ".join(f"{part} {1000 * value:.0f}" for part, value in guess.parts.items() if value > 5e-4)
                lines.append(
                    f"| {processes} | {name} | {measured[name]:.3f} | {guess.total:.3f} | "
                    f"{guess.total / measured[name] - 1:+.0%} | {peak / 2**20:.0f} | {max(memory) / 2**20:.0f} | "
                    f"{off:+.1%} | {parts} |"
                )
                print(lines[-1], flush=True)
            lines.append(_ranking(processes, measured, guesses))
            print(lines[-1], flush=True)
            close_all()
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "megatron-core"))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        "# Planner against measured runs on CPU\n\n"
        f"{datetime.date.today()}, {_cpu()}, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, {versions}; 1 thread a process, gloo. Load average of the machine "
        f"{load:.1f} before, {os.getloadavg()[0]:.1f} after.\n\n"
        f"    OMP_NUM_THREADS=1 python -m benchmarks.bench_plan {' '.join(sys.argv[1:])}\n\n".replace(" \n", "\n")
        + f"Model: {MODEL['num_layers']} layers, hidden {MODEL['hidden_size']}, random weights, fp32; {BATCH} samples "
        f"of {LENGTH} tokens a step; LoRA r {RANK} on all four linears. Step time is the best of "
        f"{options.rounds} rounds of {options.steps - 1} steps; memory is an allocation tracker's peak on the fullest "
        "rank, and its error that of the rank where it is largest.\n\nCalibration, measured before:\n\n"
        + "\n".join(rates)
        + "\n\n| processes | layout | s measured | s predicted | error | MB measured | MB predicted | error | "
        "prediction, ms |\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(x for x in lines if x.startswith("|"))
        + "\n\n" + "\n".join(x for x in lines if not x.startswith("|")) + "\n"
    )  # fmt: skip
    print(f"written: {RESULT}")


def _best(machines: list[Any]) -> Any:
    """The best of every rate, as of step times: what else runs on a machine only makes it slower. Links: the median."""
    from modellink_lora.planning.cost import Link

    def link(name: str) -> Link | None:
        links = [getattr(machine, name) for machine in machines if getattr(machine, name)]
        if not links:
            return None
        return Link(statistics.median(x.latency for x in links), statistics.median(x.bandwidth for x in links))

    rates = {name: max(getattr(m, name) for m in machines) for name in ("matmul", "attention", "stream", "weights")}
    return dataclasses.replace(
        machines[0], operator=min(machine.operator for machine in machines),
        **rates, **{name: link(name) for name in ("inside", "between", "scatter")},
    )  # fmt: skip


def _ranking(processes: int, measured: dict[str, float], guesses: dict[str, float]) -> str:
    """How many pairs whose measured difference exceeds the noise are predicted in the measured order."""
    pairs = [
        (a, b) for a, b in itertools.combinations(measured, 2)
        if abs(measured[a] - measured[b]) > NOISE * min(measured[a], measured[b])
    ]  # fmt: skip
    wrong = [(a, b) for a, b in pairs if (measured[a] < measured[b]) != (guesses[a] < guesses[b])]
    told = "".join(f"; wrong: {a} against {b}" for a, b in wrong)
    return (
        f"- {processes} processes: {len(pairs) - len(wrong)} of {len(pairs)} pairs of layouts that differ by more than "
        f"{NOISE:.0%} are ranked as measured{told}"
    )


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return f"{len(names)} cores of {names[0]}"
    return platform.processor()


if __name__ == "__main__":
    main()
