"""A parallel linear for inference: no autograd, one of several adapters beside it or none, one all-reduce at most."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from modellink_lora.device import Device
from modellink_lora.inference.request import Choice


class ServedLinear:
    """y = W x + bias + scale * (alpha / r) B A x over this rank's shards.

    The adapter's share is added before the all-reduce of a row linear: sum over ranks of B (A_i x_i) is B A x, so an
    unmerged adapter sends nothing. On a column linear each rank has its rows of B, and A whole.

    Takes the weight out of `base`, which is of no use afterwards: the device may order it in another way.
    """

    def __init__(self, base: ColumnParallelLinear | RowParallelLinear, device: Device) -> None:
        group = base.tp_group
        self.group = group if isinstance(base, RowParallelLinear) and group.size() > 1 else None
        self.bias: Tensor | None = base.bias
        self._product = device.linear(base.weight.detach(), None if self.group else self.bias)
        base.weight = None
        self.adapters: dict[str, tuple[Tensor, Tensor, float]] = {}  # name -> A [r, i], B^T [r, o], alpha / r
        self._active: tuple[Tensor, Tensor, float] | None = None

    def choose(self, choice: Choice) -> None:
        """Let `choice` run beside the base from now on; one that does not adapt this linear leaves the base alone."""
        adapter = self.adapters.get(choice.adapter)
        self._active = (adapter[0], adapter[1], adapter[2] * choice.scale) if adapter and choice.scale else None

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, i] -> [tokens, o]"""
        y = self._product(x)
        if self._active:
            a, b, scaling = self._active
            low = F.linear(x.to(a.dtype), a)  # [tokens, r]
            same = a.dtype == y.dtype  # the adapter may have more digits than the base, as it was trained
            y = torch.addmm(y, low, b, alpha=scaling) if same else y + (low * scaling @ b).to(y.dtype)
        if self.group:
            dist.all_reduce(y, group=self.group)
            if self.bias is not None:
                y = y + self.bias
        return y
