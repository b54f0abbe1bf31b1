"""Dropout whose masks are the same on every layout: hashed from seed, site, sample, position and feature.

Letters: s positions, b samples, f features, p probability. Where an input is cut over tensor-parallel ranks, each rank
hashes the global numbers of its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modellink_lora.device.hashing import dropped, mix
from modellink_lora.device.lora_ops import Mask
from modellink_lora.parallel.partition import Partition
from modellink_lora.parallel.random import current_samples, row_keys, site_key


class Dropout(torch.nn.Module):
    """Zeroes elements with probability p and scales the rest by 1 / (1 - p), in training only.

    Args:
        rank: tensor-parallel rank.
        cut: which dimension of [s, b, f] the ranks share out in equal parts: "positions", "features" or None.
    """

    def __init__(self, p: float, *, rank: int, cut: str | None) -> None:
        super().__init__()
        assert cut in ("positions", "features", None)
        self.p, self.rank, self.cut = p, rank, cut
        self.site: int | None = None  # set by `name_sites`

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, f] -> the same shape"""
        if not self.training or self.p == 0.0:
            return x
        s, _, f = x.shape
        rows = row_keys(self._site(), current_samples(), self._numbers(s, "positions", x.device))  # [s, b]
        return _Drop.apply(x, rows[..., None], self._numbers(f, "features", x.device), self.p)

    def mask(self, x: Tensor, *, ranks: int = 1) -> Mask | None:
        """What `forward` takes from x [s, b, f], or [s, f] of one sample, with the rows one after another.

        Args:
            ranks: x is this rank's part of the positions, and the mask of all ranks' parts together is asked for.
        """
        if not self.training or self.p == 0.0:
            return None
        s, f = x.shape[0], x.shape[-1]
        positions = self._numbers(s, "positions", x.device)
        if ranks > 1:
            positions = torch.arange(s * ranks, device=x.device, dtype=torch.int32)
        rows = row_keys(self._site(), current_samples(), positions)
        assert rows.numel() == x.numel() // f * ranks, "one row key for each token"
        return Mask(rows.flatten(), self._numbers(f, "features", x.device), self.p)

    def probabilities(self, x: Tensor) -> Tensor:
        """Attention weights [b, n, s, s]: heads are the features that ranks share out, keys the columns of a row."""
        if not self.training or self.p == 0.0:
            return x
        _, n, s, keys = x.shape
        rows = row_keys(self._site(), current_samples(), torch.arange(s, device=x.device))  # [s, b]
        heads = self._numbers(n, "features", x.device)
        per_head = mix(rows.t()[:, None] + mix(heads)[:, None])  # [b, n, s]
        return _Drop.apply(x, per_head[..., None], torch.arange(keys, device=x.device, dtype=torch.int32), self.p)

    def _site(self) -> int:
        assert self.site is not None, "name_sites was not called"
        return self.site

    def _numbers(self, count: int, dimension: str, device: torch.device) -> Tensor:
        """Global numbers of `count` local positions or features, int32."""
        first = self.rank * count if self.cut == dimension else 0
        return torch.arange(first, first + count, device=device, dtype=torch.int32)


class _Drop(torch.autograd.Function):
    """Keeps no mask: the backward pass hashes it again from one key a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.p = p
        return x.masked_fill(dropped(rows, columns, p), 0).mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows, columns = ctx.saved_tensors
        return grad.masked_fill(dropped(rows, columns, ctx.p), 0).mul_(1 / (1 - ctx.p)), None, None, None


class ResidualAdd(torch.nn.Module):
    """residual + scale * dropout(norm(x + bias)), the norm only where `behind` sets one.

    megatron-core's layers first call the module to get the function they then use.
    """

    def __init__(self, p: float, *, rank: int, cut: str | None, scale: float = 1.0) -> None:
        super().__init__()
        self.dropout = Dropout(p, rank=rank, cut=cut)
        self.scale = scale
        self._norm: Callable[[Tensor], Tensor] | None = None

    def behind(self, norm: torch.nn.Module) -> None:
        """Norm each branch with `norm`, which stays a module of the layer and is none of this one."""
        self._norm = norm.forward

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        x, bias = x_with_bias
        x = x if bias is None else x + bias
        branch = self.dropout(x if self._norm is None else self._norm(x))
        return residual + (branch if self.scale == 1.0 else branch * self.scale)


def name_sites(model: torch.nn.Module, seed: int, partition: Partition, stage: int, chunk: int) -> None:
    """Give every Dropout of a built model its key, from the global name of the module it is in."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = site_key(seed, partition.to_global(name, stage, chunk))
