"""Timing of interleaved cases, and result files that say on what machine, with what and by what command they came."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "peft", "transformers", "lm-eval", "triton", "unsloth")
Clock = Callable[[Callable[[], object]], float]


def cpu_seconds(function: Callable[[], object]) -> float:
    """Processor time of this process, which other processes of the machine hardly change."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def wall_seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleaved(
    cases: Mapping[str, Callable[[], object]], clock: Clock, *, budget: float, least: int, most: int
) -> dict[str, list[float]]:
    """Seconds of each case in each round; a round runs every case once, so that all see the same machine.

    Args:
        budget: seconds after which no further round starts, once `least` are done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for function in cases.values():
        function()
    begin = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - begin > budget:
            break
        for name, function in cases.items():
            seconds[name].append(clock(function))
    return seconds


def ratios(seconds: Mapping[str, list[float]], *, to: str) -> dict[str, dict[str, float]]:
    """For each case: median seconds, its ratio to the median of `to`, the ratio of the minima, and repetitions."""
    base = seconds[to]
    return {
        name: {
            "seconds": statistics.median(all_),
            "ratio": statistics.median(all_) / statistics.median(base),
            "ratio_of_minima": min(all_) / min(base),
            "repetitions": len(all_),
        }
        for name, all_ in seconds.items()
    }


def facts() -> dict[str, Any]:
    """Machine, versions, date and command."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": cpu_name(),
        "accelerator": accelerator_name(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": round(os.getloadavg()[0], 1),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def write(name: str, result: dict[str, Any], begun: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json: `begun`, the facts as they were at the start, and the result."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".json.new")
    temporary.write_text(json.dumps({**begun, "load_after": round(os.getloadavg()[0], 1), **result}, indent=1) + "\n")
    temporary.replace(path)
    print(f"written: {path}", flush=True)
    return path


def quiet() -> None:
    """Silence what megatron-core says about libraries that a benchmark on a CPU does not need."""
    import logging
    import warnings

    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def version_of(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return f"{len(names)} cores of {names[0]}"
    return platform.processor()


def accelerator_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _module() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
