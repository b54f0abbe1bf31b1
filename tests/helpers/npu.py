"""Runs a program on a simulated Ascend NPU (tests/npu_sim), in processes of its own."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.npu_sim import build

REPOSITORY = Path(__file__).resolve().parents[2]


@functools.cache
def why_unavailable() -> str:
    """What the simulator lacks on this machine; empty if nothing."""
    try:
        build.prepare()
    except build.Unavailable as reason:
        return str(reason)
    return ""


def skip_without_simulator() -> None:
    """Skip the running test, with the reason, where the simulator cannot be had."""
    if why_unavailable():
        pytest.skip(f"no simulated NPU: {why_unavailable()}")


def run_on_simulated_npu(
    target: str | Path,
    args: Sequence[str | Path] = (),
    processes: int = 2,
    *,
    timeout: float = 300,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Start `target`, a module name or a script's path, under torchrun with `processes` ranks, each with its own NPU.

    Returns what torchrun returned, stdout and stderr as text. Everything is ended after `timeout` seconds, which
    raises subprocess.TimeoutExpired. Skips the test where the simulator cannot be had.
    """
    skip_without_simulator()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.npu_sim.launch", str(target), *map(str, args)]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="npu_sim_", dir=memory) as shared:
        environment = {**simulator_environment(), "NPU_SIM_SHM": shared, **(env or {})}
        started = subprocess.Popen(
            command,
            cwd=cwd or REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = started.communicate(timeout=timeout)
        except BaseException:
            # torchrun's workers have sessions of their own: ask it first, it ends them
            started.terminate()
            try:
                started.wait(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def run_on_null_npu(module: str, args: Sequence[str] = (), *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `module` in one process on an NPU whose operators do nothing but note that they were launched."""
    skip_without_simulator()
    environment = simulator_environment()
    environment["LD_LIBRARY_PATH"] = _joined(str(build.prepare().null), environment["LD_LIBRARY_PATH"])
    return subprocess.run(
        [sys.executable, "-m", module, *args], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


def simulator_environment() -> dict[str, str]:
    """This process's environment with what a simulated NPU needs."""
    built = build.prepare()
    return {
        **os.environ,
        "LD_LIBRARY_PATH": _joined(str(built.libraries), os.environ.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined(str(REPOSITORY), str(built.site), os.environ.get("PYTHONPATH")),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # launch.py imports torch_npu itself; torchrun does not need it
        "TASK_QUEUE_ENABLE": "0",  # operators run in the calling thread: the simulated streams keep no order
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(path for path in paths if path)
