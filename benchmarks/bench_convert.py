"""Conversion against the least any program could do, a copy: wall time and anonymous memory on a generated Llama.

    python -m benchmarks.bench_convert --folder DIR [--rounds 3] [--large]

Every case writes the same bytes and waits for the disk; a round runs each case once, in a process of its own whose
clock starts when its imports are done. Anonymous memory is sampled from /proc, beyond what the imports took. `--large`
repeats the two conversions once on a model of 14 GB. Everything generated is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness

RANK = 16
SIZES: dict[str, dict[str, int]] = {  # fields of tests.helpers.made_model.Dimensions
    "1.8 GB": dict(layers=16, heads=16, groups=8, head_dim=128, hidden=2048, ffn=5632, vocab=32000),
    "14 GB": dict(layers=36, heads=32, groups=8, head_dim=128, hidden=4096, ffn=12288, vocab=32000),
}
GOALS = {"merge and export": 2.0, "reshard": 1.3}


def generate(folder: Path, size: str) -> None:
    """The model (`hf`), at TP 2 in mcore names (`mg`), and an adapter of its base (`adapter`, and `peft`)."""
    import torch

    from modellink_lora.checkpoint.adapter_kinds import open_adapter
    from modellink_lora.checkpoint.peft import write_peft
    from tests.helpers.conversion import convert, random_adapter
    from tests.helpers.made_model import Dimensions, made_sharded_model

    made_sharded_model(folder / "hf", Dimensions(**SIZES[size], dtype=torch.bfloat16))
    random_adapter(folder / "adapter", folder / "hf", r=RANK)
    write_peft(folder / "peft", open_adapter(folder / "adapter"), base_model=str(folder / "hf"))
    convert(folder / "hf", folder / "mg", to="mg", target_tensor_parallel_size=2, use_mcore_models=True)


def copy(folder: Path) -> Callable[[], object]:
    """`cp` of the checkpoint, on the disk when it returns."""
    source, target = folder / "mg/iter_0000001", folder / "out"

    def work() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        subprocess.run(["sync", *(str(path) for path in target.rglob("*") if path.is_file())], check=True)

    return work


def reshard(folder: Path) -> Callable[[], object]:
    return _conversion(folder, "--save-model-type", "mg", "--target-pipeline-parallel-size", "2")


def merge_and_export(folder: Path) -> Callable[[], object]:
    return _conversion(folder, "--save-model-type", "hf", "--lora-load", str(folder / "adapter"))


def _conversion(folder: Path, *words: str) -> Callable[[], object]:
    import modellink_lora.convert.execute  # noqa: F401  what the job imports late
    from modellink_lora.cli.convert import main

    given = ["--load-model-type", "mg", "--load-dir", str(folder / "mg"), "--save-dir", str(folder / "out")]
    return lambda: main([*given, *words])


def peft(folder: Path) -> Callable[[], object]:
    """What users of PEFT do: load, merge_and_unload, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16, trust_remote_code=False)
        merged = PeftModel.from_pretrained(model, str(folder / "peft")).merge_and_unload()
        merged.save_pretrained(folder / "out")
        subprocess.run(["sync", *(str(path) for path in (folder / "out").iterdir())], check=True)

    return work


CASES: dict[str, Callable[[Path], Callable[[], object]]] = {
    "cp": copy, "reshard": reshard, "merge and export": merge_and_export, "PEFT": peft,
}  # fmt: skip


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def processor_seconds() -> float:
    """Of this process and those it waited for, in the program and in the kernel."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def child(case: str, folder: Path) -> None:
    """Run one case and print what it took as the last line."""
    work = CASES[case](folder)
    most, done, before = [0], threading.Event(), anonymous()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin, cpu = time.perf_counter(), processor_seconds()
    work()
    seconds, cpu = time.perf_counter() - begin, processor_seconds() - cpu
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "anonymous": max(0, most[0] - before)}))


def measure(case: str, folder: Path) -> dict[str, float]:
    """One run in a fresh process, from warm sources to an empty target."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file():
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    words = [sys.executable, "-m", "benchmarks.bench_convert", "--folder", str(folder), "--child", case]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(folder / "out", ignore_errors=True)
    return result


def largest_bytes(size: str) -> int:
    """Of the tensors of a model as Megatron holds them."""
    dims = SIZES[size]
    return 2 * dims["hidden"] * max(dims["vocab"], 2 * dims["ffn"])


def bench(size: str, folder: Path, rounds: int, cases: list[str]) -> dict[str, Any]:
    """Medians of every case, their ratios to `cp`, and the most memory of any round."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        generate(folder, size)
        files = list((folder / "mg").rglob("*.pt"))
        runs: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for number in range(rounds):
            for case in cases:
                runs[case].append(measure(case, folder))
                print(f"{size} round {number + 1} {case}: {runs[case][-1]}", flush=True)
        seconds = {case: [run["seconds"] for run in all_] for case, all_ in runs.items()}
        rows = harness.ratios(seconds, to="cp")
        for case, all_ in runs.items():
            rows[case]["anonymous"] = max(run["anonymous"] for run in all_)
            rows[case]["cpu"] = min(run["cpu"] for run in all_)
        largest = largest_bytes(size)
        return {
            "bytes": sum(path.stat().st_size for path in files), "largest": largest,
            "memory_goal": 2 * largest + 64 * 2**20, "goals": GOALS, "cases": rows,
            "spread_of_cp": max(seconds["cp"]) / statistics.median(seconds["cp"]),
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; a subfolder is made and deleted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also the model of 14 GB, which needs 60 GB of disk")
    parser.add_argument("--child", choices=tuple(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.folder)
        return
    begun = harness.facts()
    free = shutil.disk_usage(given.folder).free
    needed = 60e9 if given.large else 7e9
    if free < needed:
        raise SystemExit(f"{given.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed")
    sizes = {"1.8 GB": bench("1.8 GB", given.folder / "bench-convert", given.rounds, list(CASES))}
    if given.large:
        sizes["14 GB"] = bench("14 GB", given.folder / "bench-convert", 1, [case for case in CASES if case != "PEFT"])
    harness.write("convert", {"rank": RANK, "workers": len(os.sched_getaffinity(0)), "sizes": sizes}, begun)


if __name__ == "__main__":
    main()
