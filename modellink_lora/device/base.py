"""The device protocol: what a job may ask of the hardware it runs on."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from modellink_lora.config.errors import UserError
from modellink_lora.device.elementwise import RmsNorm, Swiglu
from modellink_lora.device.lora_ops import LoraOps

T = TypeVar("T")


class Device(abc.ABC):
    """One kind of hardware. `activate` comes first; the rest works on the device it chose.

    Attributes:
        plain: fused operator -> why plain PyTorch computes it in this process.

    Letters: b batch, n query heads, g query groups, s sequence, d head dim. In the products joined with a collective:
    n tokens of one rank, t ranks, k and m inputs and outputs.
    """

    plain: Mapping[str, str] = MappingProxyType({})
    name: str  # "cpu", "cuda", "npu"
    backend: str  # torch.distributed backend
    widest_float = torch.float64  # that its collectives add up
    lora_ops = LoraOps()  # the r-wide operations of a LoRA linear
    runs_transformer_engine: bool = False  # whether its kernels are made for this device
    records_graphs: bool = False  # whether `record` can be called
    fused_collectives: bool = False  # whether a job wants gather_matmul and matmul_scatter

    @classmethod
    @abc.abstractmethod
    def available(cls) -> bool:
        """Whether this process can use the device; never raises."""

    @classmethod
    @abc.abstractmethod
    def why_unavailable(cls) -> str:
        """What is missing and what to do, for an error message."""

    @abc.abstractmethod
    def activate(self, local_rank: int) -> torch.device:
        """Choose device `local_rank`, prepare megatron-core for it, return the torch device."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""

    @abc.abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the device's default generator."""

    @abc.abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes: allocated, max allocated, reserved, max reserved."""

    @abc.abstractmethod
    def reset_peak_memory(self) -> None:
        """Let "max allocated" of `memory` begin anew."""

    @abc.abstractmethod
    def free_memory(self) -> int:
        """Bytes that can still be allocated; on a CPU all processes of the host share them."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Chip and library versions, for the start summary."""

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record the kernels that `work` launches, without running them.

        Returns a function that runs them again, on the same addresses, and what `work` returned, whose tensors hold
        something only after that. What the function reads and writes must stay where it is.
        """
        raise UserError(f"--cuda-graph-impl local needs a CUDA device, this one is {self.name}: leave it out")

    @contextlib.contextmanager
    def recordable(self) -> Iterator[None]:
        """Hooks on parameters that are set in here may run inside `record`."""
        yield

    def adopt_mindspeed(self) -> None:
        """Let MindSpeed adapt megatron-core to the device. Comes before `activate`; the command line must be empty."""
        raise UserError(f"MODELLINK_MINDSPEED=1: MindSpeed is for Ascend NPUs, this runs on {self.name}; unset it")

    def leave_out(self, operators: Sequence[str]) -> list[str]:
        """Compute these fused operators with plain PyTorch from now on. Returns what is to be said about it."""
        return [f"--npu-plain-operators has no effect here: it needs a device of kind npu, this is {self.name}"] * bool(
            operators
        )

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Most FLOP/s that one device can do in dense matrix multiplications of `dtype`; None if that is not known."""
        return None

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
        """softmax(q k^T * scale) v; q [b, n, s, d], k and v [b, g, l, d] -> [b, n, s, d].

        With `causal` key j is seen by query i up to j = i, and no mask is built; or, given `where` [b, s], which holds
        the queries' positions among l >= s keys, up to j = where[i], by a mask [b, 1, s, l].

        Scores that are capped or lean towards near keys (`softmax_attention`) are computed out of single operations,
        which keep them for backward: no kernel that all devices have takes them in fp32.
        """
        if slopes is not None or softcap:
            return softmax_attention(q, k, v, causal=causal, scale=scale, slopes=slopes, softcap=softcap, where=where)
        grouped = q.shape[1] != k.shape[1]
        if where is not None:
            seen = torch.arange(k.shape[2], device=k.device) <= where[:, None, :, None]  # [b, 1, s, l]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A function x [n, i] -> x weight^T + bias [n, o] for a weight that stays as it is, without gradients.

        A device may keep a copy of the weight in the order that its kernel likes; the caller need not keep his.
        """
        return lambda x: F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
        """x / rms(x) * weight over the last dimension, statistics in fp32, rounded to x's dtype before the weight.

        The order of roundings is that of transformers' Llama. With `one_more` the factor is 1 + weight, rounded as in
        its Gemma. Keeps nothing but x and a number a row for backward.
        """
        if x.dtype == torch.float32 and not one_more and not torch.is_grad_enabled():
            return F.rms_norm(x, weight.shape, weight, eps)  # in fp32 the order of roundings is no matter
        return RmsNorm.apply(x, weight, eps, one_more)

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up of x = [gate, up], [..., 2 f] -> [..., f]. Keeps nothing but x for backward."""
        if not torch.is_grad_enabled():
            gate, up = x.chunk(2, -1)
            return F.silu(gate).mul_(up)
        return Swiglu.apply(x)

    def gather_matmul(self, x: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor] | None:
        """All-gather and product as one operator; None: not here, or outside its limits, on all ranks alike.

        x [n, k] of this rank, weight [m, k] -> (P @ weight^T [t n, m], P [t n, k]), P the ranks' x one below the other.
        No gradient flows through it: it is for use inside an autograd function.
        """
        return None

    def matmul_scatter(self, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor | None:
        """Product and reduce-scatter as one operator; None as in `gather_matmul`.

        x [t n, k], weight [m, k], which may be transposed or strided -> rows [n, m] of this rank of the sum over ranks
        of x @ weight^T.
        """
        return None


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    thin: Callable[[Tensor], Tensor] | None = None,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    where: Tensor | None = None,
) -> Tensor:
    """Attention out of matmul and softmax, in the shapes of `Device.attention`.

    Args:
        thin: dropout on the attention weights [b, n, s, s], which are fp32 here.
        slopes: [n], of ALiBi (arXiv:2108.12409): a score loses slope * distance between query and key.
        softcap: c > 0: scores become c tanh(scores / c), before ALiBi and masking.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)  # [b, g, s, d] -> [b, n, s, d]
    scores = (q @ k.mT).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    keys = torch.arange(scores.shape[-1], device=scores.device)
    queries = keys[: scores.shape[-2]] if where is None else where[:, None]  # [s] or [b, 1, s]
    behind = keys - queries[..., None]  # j - i, 0 or less where seen; [s, l] or [b, 1, s, l]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * behind
    if causal:
        scores = scores.masked_fill(behind > 0, float("-inf"))
    weights = scores.softmax(-1)
    return (thin(weights) if thin else weights).to(v.dtype) @ v
