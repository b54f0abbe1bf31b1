"""CPU over gloo: complete, and what every test runs on."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil
import torch

from modellink_lora.device import redirect
from modellink_lora.device.base import Device


class CpuDevice(Device):
    name = "cpu"
    backend = "gloo"

    @classmethod
    def available(cls) -> bool:
        return True

    @classmethod
    def why_unavailable(cls) -> str:
        raise AssertionError("a CPU is always there")

    def activate(self, local_rank: int) -> torch.device:
        redirect.install(redirect.CPU)
        return torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def memory(self) -> dict[str, int]:
        """Resident memory of the process: a CPU has no allocator statistics."""
        resident = psutil.Process().memory_info().rss
        peak = max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return {"allocated": resident, "max allocated": peak, "reserved": resident, "max reserved": peak}

    def reset_peak_memory(self) -> None:
        with contextlib.suppress(OSError):  # where the kernel does not allow it the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")

    def free_memory(self) -> int:
        return int(psutil.virtual_memory().available)

    def describe(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads a process, gloo, torch {torch.__version__}"
