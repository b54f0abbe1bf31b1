"""placeholder until the NPU file lands"""
from modellink_lora.device.base import Device


class NpuDevice(Device):
    name = "npu"
    backend = "hccl"

    @classmethod
    def available(cls) -> bool:
        return False

    @classmethod
    def why_unavailable(cls) -> str:
        return "torch_npu is not installed"
