"""Ascend NPU over HCCL: torch_npu's own interface, megatron-core redirected to it, fused operators."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from modellink_lora.config.errors import UserError
from modellink_lora.config.npu import NPU_OPERATORS
from modellink_lora.device import fused_npu, npu_check, redirect
from modellink_lora.device.base import Device, softmax_attention
from modellink_lora.device.peaks import npu_peak

_MINDSPEED = "mindspeed.megatron_adaptor"


class NpuDevice(Device):
    """One Ascend NPU."""

    name = "npu"
    backend = "hccl"
    widest_float = torch.float32  # HCCL's sums of fp64 are not documented for every chip

    def __init__(self) -> None:
        self.plain: dict[str, str] = {}

    @classmethod
    def available(cls) -> bool:
        return not _obstacle()

    @classmethod
    def why_unavailable(cls) -> str:
        return _obstacle()

    def activate(self, local_rank: int) -> torch.device:
        if _obstacle():
            raise UserError(_obstacle())
        count = _npu().device_count()
        if local_rank >= count:
            raise UserError(
                f"process {local_rank} of this host has no NPU: {count} visible; start at most {count} a host "
                "or widen ASCEND_RT_VISIBLE_DEVICES"
            )
        _npu().set_device(local_rank)
        # MindSpeed redirects megatron-core itself, and more of it; on top of each other they would undo each other
        if _MINDSPEED not in sys.modules:
            redirect.install(redirect.NPU, rotary=self.rotary)
        self.plain = npu_check.unfit(torch.device("npu", local_rank))
        return torch.device("npu", local_rank)

    def adopt_mindspeed(self) -> None:
        """Import MindSpeed's adaptor, which patches megatron-core and torch, before anything of megatron-core."""
        assert not any(name.startswith("megatron.core") for name in sys.modules), "MindSpeed comes first"
        try:
            importlib.import_module(_MINDSPEED)
        except Exception as error:  # it brings a dozen libraries of its own, any of which may be missing or too new
            raise UserError(
                f"MODELLINK_MINDSPEED=1: {_MINDSPEED} does not load ({type(error).__name__}: {_first_line(error)}); "
                "install the MindSpeed branch that belongs to your megatron-core, or unset MODELLINK_MINDSPEED"
            ) from error

    def leave_out(self, operators: Sequence[str]) -> list[str]:
        names = NPU_OPERATORS if "all" in operators else operators
        self.plain |= dict.fromkeys(names, "--npu-plain-operators")
        return []

    def synchronize(self) -> None:
        _npu().synchronize()

    def seed(self, seed: int) -> None:
        _npu().manual_seed(seed)

    def memory(self) -> dict[str, int]:
        npu = _npu()
        return {
            "allocated": npu.memory_allocated(),
            "max allocated": npu.max_memory_allocated(),
            "reserved": npu.memory_reserved(),
            "max reserved": npu.max_memory_reserved(),
        }

    def reset_peak_memory(self) -> None:
        _npu().reset_peak_memory_stats()

    def free_memory(self) -> int:
        npu = _npu()
        return int(npu.mem_get_info()[0] + npu.memory_reserved() - npu.memory_allocated())

    def supports(self, dtype: torch.dtype) -> bool:
        if dtype == torch.bfloat16:
            return bool(_npu().is_bf16_supported())
        return dtype in (torch.float32, torch.float16)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float,
        slopes: Tensor | None = None,
        softcap: float = 0.0,
        where: Tensor | None = None,
    ) -> Tensor:
        if slopes is not None or softcap:
            return super().attention(q, k, v, causal=causal, scale=scale, slopes=slopes, softcap=softcap, where=where)
        # not torch's scaled_dot_product_attention: on NPU it would end in the same fused kernel
        if "npu_fusion_attention" in self.plain:
            return _plain_attention(q, k, v, causal=causal, scale=scale, where=where)
        return fused_npu.attention(q, k, v, causal=causal, scale=scale, where=where, reference=_plain_attention)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
        # with one_more the fused norm would take 1 + weight rounded to 16 bits
        if one_more or "npu_rms_norm" in self.plain:
            return super().rms_norm(x, weight, eps, one_more=one_more)
        return fused_npu.rms_norm(x, weight, eps, reference=super().rms_norm)

    def swiglu(self, x: Tensor) -> Tensor:
        if "npu_swiglu" in self.plain:
            return super().swiglu(x)
        return fused_npu.swiglu(x, reference=super().swiglu)

    def rotary(self, x: Tensor, angles: Tensor, *, interleaved: bool, reference: Callable[[Tensor], Tensor]) -> Tensor:
        """x [s, b, n, d] with its first channels turned by angles [s, 1, 1, channels], as `reference` does it."""
        if "npu_rotary_mul" in self.plain:
            return reference(x)
        return fused_npu.rotary(x, angles, interleaved=interleaved, reference=reference)

    def gather_matmul(self, x: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor] | None:
        return fused_npu.gather_matmul(x, weight, group) if self.fused_collectives else None

    def matmul_scatter(self, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor | None:
        return fused_npu.matmul_scatter(x, weight, group) if self.fused_collectives else None

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return npu_peak(_npu().get_device_name(), dtype)

    def describe(self) -> str:
        torch_npu = importlib.import_module("torch_npu")
        redirected = ", MindSpeed" if _MINDSPEED in sys.modules else ""
        fused = ", ".join(name for name in NPU_OPERATORS if name not in self.plain) or "none"
        plain = "".join(f"; not {name}: {why}" for name, why in self.plain.items())
        return (
            f"{_npu().get_device_name()}, CANN {_cann_version()}, HCCL, torch_npu {torch_npu.__version__}, "
            f"torch {torch.__version__}{redirected}; fused operators: {fused}{plain}"
        )


@functools.cache
def _obstacle() -> str:
    """Why this process cannot use an NPU and what to do; empty when it can. Loads torch_npu, once."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed; install the torch-npu release that belongs to your torch and CANN"
    try:
        importlib.import_module("torch_npu")
        count = _npu().device_count()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return (
            f"torch_npu does not load ({_first_line(error)}); source CANN's set_env.sh before Python and check that "
            f"torch {torch.__version__}, torch_npu and CANN are releases that belong together"
        )
    if not count:
        return "torch_npu sees no NPU; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    return ""


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, where: Tensor | None) -> Tensor:
    """With `where` keys are hidden whether or not `causal` is set, as `Device.attention` has it."""
    return softmax_attention(q, k, v, causal=causal or where is not None, scale=scale, where=where)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _npu():  # type: ignore[no-untyped-def]  # torch.npu exists once torch_npu is loaded
    return torch.npu  # type: ignore[attr-defined]


def _cann_version() -> str:
    try:
        return str(importlib.import_module("torch_npu.npu.utils").get_cann_version()) or "unknown"
    except (ImportError, AttributeError, OSError, RuntimeError):
        return "unknown"
