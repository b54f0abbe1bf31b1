"""Everything that differs between CUDA, Ascend NPU and CPU. Nothing outside this folder knows which one runs."""

from __future__ import annotations

from collections.abc import Mapping

from modellink_lora.config.errors import UserError
from modellink_lora.device.base import Device
from modellink_lora.device.cpu import CpuDevice
from modellink_lora.device.cuda import CudaDevice
from modellink_lora.device.npu import NpuDevice

__all__ = ["DEVICES", "Device", "get_device"]

# in the order of preference
DEVICES: Mapping[str, type[Device]] = {"npu": NpuDevice, "cuda": CudaDevice, "cpu": CpuDevice}


def get_device(name: str = "auto") -> Device:
    """The device called `name`; "auto" takes the first available of npu, cuda, cpu.

    Raises UserError for an unknown name, or one that is asked for and not available.
    """
    if name == "auto":
        return next(cls() for cls in DEVICES.values() if cls.available())
    if name not in DEVICES:
        raise UserError(f"--device {name}: choose auto, {', '.join(DEVICES)}")
    if not DEVICES[name].available():
        raise UserError(f"--device {name}: {DEVICES[name].why_unavailable()}")
    return DEVICES[name]()
