"""Peers that only a GPU runs: kernels of other projects where they can be imported, and torch.compile around PEFT."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import Shape, make_base, make_factors
from benchmarks.peers import First, build, fused

FUNCTIONS = {  # peer: where its fused linear lives
    "unsloth": ("unsloth.kernels.fast_lora", "LoRA_W"),
    "lorafusion": ("lorafusion.ops.lora_v1", "fused_linear_lora"),
}


class Foreign(torch.nn.Module):
    """A frozen weight and two factors, handed to a function of another project."""

    def __init__(self, name: str, function: Any, weight: Tensor, a: Tensor, b: Tensor, shape: Shape) -> None:
        super().__init__()
        self.name, self.function, self.weight, self.shape = name, function, weight, shape
        self.lora_A, self.lora_B = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)  # [s, b, i] -> [b, s, i], which both expect; a view
        if self.name == "unsloth":
            y = self.function.apply(x, self.weight, None, self.lora_A, self.lora_B, self.shape.scaling)
        else:
            y = self.function(
                x, self.weight, self.lora_A, self.lora_B, self.shape.scaling, seed=42, dropout_p=self.shape.dropout
            )
        return y.transpose(0, 1)


def missing(name: str) -> str:
    """Why a peer cannot run here; empty if it can."""
    if name not in FUNCTIONS:
        return ""
    module, attribute = FUNCTIONS[name]
    try:
        getattr(importlib.import_module(module), attribute)
    except Exception as error:  # these check GPUs and versions when they are imported
        return f"{module}.{attribute}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def build_gpu(name: str, shape: Shape, group: Any, device: str) -> torch.nn.Module:
    """As `peers.build`, with "peft compiled", the peers of FUNCTIONS, and "L0 triton": ours with Triton kernels."""
    if name == "peft compiled":
        return torch.compile(build("peft", shape, group, device))  # type: ignore[return-value]
    if name not in FUNCTIONS and not name.endswith(" triton"):
        return build(name, shape, group, device)
    torch.manual_seed(7)
    base = make_base(shape, group, device)
    a, b = make_factors(shape, group, device=device)
    if name.endswith(" triton"):
        layer: First = fused(base, a, b, shape, level=name.split()[0], device=device)  # type: ignore[assignment]
        layer.inner.device.triton_lora = True
        return layer
    module, attribute = FUNCTIONS[name]
    return Foreign(name, getattr(importlib.import_module(module), attribute), base.weight, a, b, shape)
