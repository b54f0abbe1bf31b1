"""CPU over gloo: complete, and what every test runs on."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from modellink_lora.device import redirect
from modellink_lora.device.base import Device

_FEW_ROWS = 8  # tokens of a decoding step: the order is chosen for about so many


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

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """For weights with many more outputs than inputs oneDNN's, reordered once: they gain with any number of rows.

        Others gain from two rows on and lose with one. torch has no public name for these
        operators, which its compiler uses: without them the usual kernel is taken.
        """
        operators = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
        product = getattr(operators, "_linear_pointwise", None)
        reorder = getattr(operators, "_reorder_linear_weight", None)
        outputs, inputs = weight.shape
        if outputs < 2 * inputs or weight.dtype != torch.float32 or product is None or reorder is None:
            return super().linear(weight, bias)
        reordered = reorder(weight.detach(), _FEW_ROWS)
        return lambda x: product(x, reordered, bias, "none", [], "")

    def describe(self) -> str:
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads != 1)} a process, gloo, torch {torch.__version__}"
