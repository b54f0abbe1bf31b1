"""The four LoRA linears of a decoder layer at the sizes of known models, and single bases to adapt.

Letters: n tokens of the whole sequence group, i/o in/out features of the whole linear, r rank, t tensor parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One parallel linear and the tokens that go through it."""

    kind: str  # column | row
    tokens: int
    inputs: int
    outputs: int
    rank: int = 16
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    scaling: float = 2.0

    def input_of(self, t: int) -> tuple[int, int, int]:
        """[s, b, i] of one rank."""
        column = self.kind == "column"
        tokens = self.tokens // t if self.sequence_parallel and column else self.tokens
        return tokens, 1, self.inputs if column else self.inputs // t

    def output_of(self, t: int) -> tuple[int, int, int]:
        column = self.kind == "column"
        tokens = self.tokens // t if self.sequence_parallel and not column else self.tokens
        return tokens, 1, self.outputs // t if column else self.outputs


# name: (hidden, qkv rows, MLP width)
MODELS = {"7B": (4096, 12288, 11008), "70B": (8192, 10240, 28672)}


def decoder_layer(hidden: int, qkv: int, ffn: int, **common: Any) -> dict[str, Shape]:
    """The LoRA linears of a Llama layer; fc1 holds gate and up."""
    return {
        "linear_qkv": Shape("column", inputs=hidden, outputs=qkv, **common),
        "linear_proj": Shape("row", inputs=hidden, outputs=hidden, **common),
        "linear_fc1": Shape("column", inputs=hidden, outputs=2 * ffn, **common),
        "linear_fc2": Shape("row", inputs=ffn, outputs=hidden, **common),
    }


def start_alone(backend: str = "gloo", ranks: int = 1) -> None:
    """A process group of one process. "fake": rank 0 of `ranks` that do not exist, whose collectives do nothing."""
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())


def make_base(shape: Shape, group: Any, device: torch.device | str = "cpu") -> torch.nn.Module:
    """megatron-core's own linear with a frozen weight of N(0, 0.02^2)."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    t = group.size()
    config = TransformerConfig(
        num_layers=1, hidden_size=shape.inputs, num_attention_heads=t, params_dtype=shape.dtype,
        perform_initialization=False, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=t, sequence_parallel=shape.sequence_parallel and t > 1,
    )  # fmt: skip
    common: dict[str, Any] = dict(
        config=config, init_method=lambda weight: weight, bias=False, skip_bias_add=True, tp_group=group
    )
    if shape.kind == "column":
        base = ColumnParallelLinear(shape.inputs, shape.outputs, gather_output=False, **common)
    else:
        base = RowParallelLinear(shape.inputs, shape.outputs, input_is_parallel=True, **common)
    if torch.device(device).type != "cpu":  # tensors without data cannot be moved, not even to where they are
        base = base.to(device)
    base.requires_grad_(False)
    with torch.no_grad():
        base.weight.normal_(std=0.02)
    return base


def make_factors(
    shape: Shape, group: Any, *, std: float = 0.01, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """This rank's lora_A of U(-1/sqrt(i), 1/sqrt(i)) and lora_B of N(0, std^2)."""
    column, t = shape.kind == "column", group.size()
    bound = 1 / math.sqrt(shape.inputs)
    a = torch.empty(shape.rank, shape.inputs if column else shape.inputs // t, device=device).uniform_(-bound, bound)
    b = torch.empty(shape.outputs // t if column else shape.outputs, shape.rank, device=device).normal_(std=std)
    return a.to(dtype or shape.dtype), b.to(dtype or shape.dtype)


@dataclass
class Case:
    """A layer with its input and the gradient that comes back."""

    layer: Callable[[Tensor], Tensor]
    x: Tensor
    dy: Tensor
    parameters: tuple[Tensor, ...]

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        """Forward and backward; gradients do not pile up."""
        self.layer(self.x).backward(self.dy)
        self.clear()

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


def make_case(shape: Shape, layer: torch.nn.Module, group: Any, device: torch.device | str = "cpu") -> Case:
    t = group.size()
    x = torch.randn(shape.input_of(t), dtype=shape.dtype, device=device).requires_grad_()
    dy = torch.randn(shape.output_of(t), dtype=shape.dtype, device=device)
    return Case(layer, x, dy, tuple(layer.parameters()))
