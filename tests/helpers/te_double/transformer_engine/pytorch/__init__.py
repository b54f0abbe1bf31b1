"""The modules that megatron-core builds its classes on."""

from __future__ import annotations

import types
from typing import Any

import torch

from transformer_engine.pytorch.modules import LayerNorm, LayerNormLinear, Linear, RMSNorm


class _NotDoubled(torch.nn.Module):
    """Here so that classes can be derived from it, and modules compared with it, as PEFT does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__mro__[1].__name__} has no double")


class DotProductAttention(_NotDoubled): ...


class GroupedLinear(_NotDoubled): ...


class LayerNormMLP(_NotDoubled): ...


class _CudaRNGStatesTracker: ...


ops = types.SimpleNamespace(Sequential=_NotDoubled, FusibleOperation=_NotDoubled)  # megatron-core's annotations
distributed = types.SimpleNamespace(CudaRNGStatesTracker=_CudaRNGStatesTracker)
__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "distributed",
    "ops",
]
