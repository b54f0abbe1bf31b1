"""The device protocol: what a job may ask of the hardware it runs on."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Device(abc.ABC):
    """One kind of hardware. `activate` comes first; the rest works on the device it chose.

    Letters: b batch, n query heads, g query groups, s sequence, d head dim.
    """

    name: str  # "cpu", "cuda", "npu"
    backend: str  # torch.distributed backend
    widest_float = torch.float64  # that its collectives add up

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
    def free_memory(self) -> int:
        """Bytes that can still be allocated; on a CPU all processes of the host share them."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Chip and library versions, for the start summary."""

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Most FLOP/s that one device can do in dense matrix multiplications of `dtype`; None if that is not known."""
        return None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
        """softmax(q k^T * scale) v; q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]. Builds no [s, s] mask."""
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, statistics in fp32, rounded to x's dtype before the weight.

        The order of roundings is that of transformers' Llama.
        """
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, thin: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Attention out of matmul and softmax, in the shapes of `Device.attention`.

    Args:
        thin: dropout on the attention weights [b, n, s, s], which are fp32 here.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)  # [b, g, s, d] -> [b, n, s, d]
    scores = (q @ k.mT).float() * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    return (thin(weights) if thin else weights).to(v.dtype) @ v
