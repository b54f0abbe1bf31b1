"""CUDA over NCCL. megatron-core is written for it, so nothing is redirected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda as backends
from torch.distributed import ProcessGroup

from modellink_lora.config.errors import UserError
from modellink_lora.device import symmetric_memory
from modellink_lora.device.apex_norm import Norm, apex_rms_norm
from modellink_lora.device.base import Device, T
from modellink_lora.device.lora_ops import LoraOps
from modellink_lora.device.lora_triton import TritonLoraOps
from modellink_lora.device.peaks import cuda_peak


class CudaDevice(Device):
    """One NVIDIA GPU.

    Attributes:
        triton_lora: do LoRA's r-wide operations with Triton kernels. Off: they were never timed on a GPU, and library
            matrix products are a safe choice. On, a GPU or tensor outside the kernels' limits still gets the library.
    """

    name = "cuda"
    backend = "nccl"
    runs_transformer_engine = True
    records_graphs = True
    triton_lora = False
    fused_norm: Norm | None = None  # chosen by `activate`
    norm_kernel = "PyTorch"

    @classmethod
    def available(cls) -> bool:
        return torch.cuda.is_available()

    @classmethod
    def why_unavailable(cls) -> str:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        return "torch sees no CUDA device; check the driver and CUDA_VISIBLE_DEVICES"

    def activate(self, local_rank: int) -> torch.device:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"process {local_rank} of this host has no GPU: {count} visible; start at most {count} a host"
            )
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
        self.fused_norm, self.norm_kernel = apex_rms_norm(here)
        return here

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seed(self, seed: int) -> None:
        torch.cuda.manual_seed(seed)

    def memory(self) -> dict[str, int]:
        return {
            "allocated": torch.cuda.memory_allocated(),
            "max allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "max reserved": torch.cuda.max_memory_reserved(),
        }

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def free_memory(self) -> int:
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by PyTorch's allocator, for reuse
        return torch.cuda.mem_get_info()[0] + kept

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """As Device.record. Collectives are recorded too; NCCL's own thread may go on asking for events meanwhile."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result

    @contextlib.contextmanager
    def recordable(self) -> Iterator[None]:
        """As Device.recordable: autograd runs a parameter's hook on the stream on which the hook was set.

        A recording may wait for any stream but the default one.
        """
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            yield
        here.wait_stream(aside)

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return None  # TensorFloat-32 has another peak
        return cuda_peak(torch.cuda.get_device_name(), dtype)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, where: Tensor | None = None, **shaping: Any
    ) -> Tensor:  # fmt: skip
        """As Device.attention. Keys and values are repeated for their queries where no fused kernel shares them.

        Shared, they would be computed by PyTorch's unfused kernel there, which keeps [s, l] scores of every head.
        """
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1 and not (where is None and shares_keys(q, k, v, causal=causal)):
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return super().attention(q, k, v, causal=causal, where=where, **shaping)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
        if self.fused_norm is None or one_more:
            return super().rms_norm(x, weight, eps, one_more=one_more)
        return self.fused_norm(x, weight, eps)

    @property
    def lora_ops(self) -> LoraOps:  # type: ignore[override]
        return TritonLoraOps() if self.triton_lora else Device.lora_ops

    def gather_matmul(self, x: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor] | None:
        return symmetric_memory.gather_matmul(x, weight, group) if self.fused_collectives else None

    def matmul_scatter(self, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor | None:
        return symmetric_memory.matmul_scatter(x, weight, group) if self.fused_collectives else None

    def describe(self) -> str:
        return (
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, NCCL, torch {torch.__version__}, "
            f"attention by {attention_kernels()}, norm by {self.norm_kernel}"
        )


def attention_kernels() -> str:
    """The fused kernels that PyTorch may choose from, and the unfused one where it has to."""
    enabled = {
        "cuDNN": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
    }
    return " or ".join(name for name, is_on in enabled.items() if is_on) or "unfused operations"


def shares_keys(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> bool:
    """Whether a fused kernel will take fewer heads of keys and values than of queries, by PyTorch's own answer.

    That is so where flash can: the memory-efficient kernel shares none, and cuDNN's, which does, stands behind the
    unfused one in PyTorch's order unless it stands before flash.
    """
    return backends.can_use_flash_attention(backends.SDPAParams(q, k, v, None, 0.0, causal, True))
