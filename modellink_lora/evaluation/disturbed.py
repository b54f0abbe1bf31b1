"""A model whose weights are moved by as much as rounding them would, to see what rounding does to its logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink_lora.models.build import Weights
from modellink_lora.training.base import Base


@dataclass(frozen=True)
class DisturbedWeights:
    """Every number is moved at random by up to half of the last digit that it has in `dtype`."""

    original: Weights
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        return self._moved(name, self.original.read(name))

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        return self._moved(name, self.original.read_shard(name, rank, size))

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        # drawn by name: processes that share a tensor move it alike
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        return tensor.float() * (1 + torch.finfo(self.dtype).eps * drawn)


@dataclass(frozen=True)
class Disturbed(Base):
    """A base with such weights, which an adapter still belongs to."""

    original: Base

    @classmethod
    def of(cls, base: Base, dtype: torch.dtype) -> Disturbed:
        return cls(base.config, base.family, DisturbedWeights(base.weights, dtype), base.root, base)

    def fingerprint(self) -> str | None:
        return self.original.fingerprint()
