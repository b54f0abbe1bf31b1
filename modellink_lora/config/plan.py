"""What the planner is asked: a model, devices, the work of one step, and numbers that replace the table's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag

_DEVICES = re.compile(r"\s*(\d+)\s*x\s*(\S.*?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class PlanConfig:
    """Planning"""

    model: str = flag(
        "", "Hugging Face folder (config.json is enough), Megatron checkpoint, or name such as llama-2-7b"
    )
    devices: str = flag("", "how many of which, e.g. 64xH200; known are H200, H100, A100-80GB, 910B and CPU")
    seq_length: int = flag(0, "length that samples are padded to", at_least=1)
    global_batch_size: int = flag(0, "samples of one step over all processes", at_least=1)
    dtype: str = flag("bf16", "dtype of weights and activations", choices=("bf16", "fp16", "fp32"))
    max_micro_batch_size: int = flag(8, "largest micro batch to consider", at_least=1)
    top: int = flag(10, "layouts to list", at_least=1)

    device_memory_gb: float = flag(0.0, "memory of a device in 10^9 bytes; default the table's", at_least=0)
    memory_fraction: float = flag(
        0.9,
        "part of it that tensors may take; the rest is for the context, communication buffers and fragmentation",
        above=0,
        at_most=1,
    )
    device_tflops: float = flag(0.0, "dense matrix TFLOP/s of a device in --dtype; default the table's", at_least=0)
    memory_bandwidth: float = flag(0.0, "device memory, GB/s; default the table's", at_least=0)
    intra_bandwidth: float = flag(
        0.0, "GB/s that one device sends to others of its host; default the table's", at_least=0
    )
    inter_bandwidth: float = flag(0.0, "GB/s that one device sends to another host; default the table's", at_least=0)
    devices_per_host: int = flag(0, "default the table's", at_least=0)

    calibrate: bool = flag(
        False, "measure matrix products, memory and collectives on this machine first, and keep the numbers"
    )
    calibration: str = flag(
        "", "file of measured numbers to use, or with --calibrate to write; default plan-calibration.json"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.model:
            raise UserError("--model is missing: give a Hugging Face folder, a Megatron checkpoint or a known name")
        if not _DEVICES.fullmatch(self.devices):
            raise UserError(f"--devices {self.devices or 'is missing'}: say how many of which, e.g. 64xH200")
        if self.count < 1:
            raise UserError(f"--devices {self.devices}: at least one device is needed")

    @property
    def count(self) -> int:
        """Devices, one process each."""
        match = _DEVICES.fullmatch(self.devices)
        assert match
        return int(match.group(1))

    @property
    def chip(self) -> str:
        match = _DEVICES.fullmatch(self.devices)
        assert match
        return match.group(2)
