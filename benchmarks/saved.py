"""Bytes that a layer keeps for its backward pass, at the size of a 7B model, counted on tensors without data.

Letters: s sequence, b batch, h hidden, n heads, d head dim, f MLP width, t tensor parallel size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.counters import Saved
from benchmarks.layers import MODELS, Shape, decoder_layer, make_case
from benchmarks.peers import build
from benchmarks.record import without_data

TOKENS, HEADS = 4096, 32
PEFT_TOKENS = 256  # real tensors, on which PEFT insists; what it keeps grows with the tokens


def of_linear(name: str, p: float) -> dict[str, float]:
    """One linear of width 4096 in bf16 on one rank: bytes, and their ratio to those of the input."""
    tokens = PEFT_TOKENS if name.startswith("peft") else TOKENS
    shape = Shape("column", tokens, 4096, 4096, dtype=torch.bfloat16, dropout=p)
    with contextlib.nullcontext() if name.startswith("peft") else without_data():
        case = make_case(shape, build(name, shape, dist.group.WORLD), dist.group.WORLD)
        with Saved() as saved:
            output = case.forward()
        kept = saved.bytes(without=case.layer.parameters())
        del output
        return {"tokens": tokens, "bytes": kept, "over_input": kept / (case.x.numel() * case.x.element_size())}


class DecoderLayer(torch.nn.Module):
    """A Llama layer of this project's norm, attention and SwiGLU around the linears of a peer."""

    def __init__(self, name: str, shapes: dict[str, Shape]) -> None:
        from megatron.core.transformer.transformer_config import TransformerConfig

        from modellink_lora.device import get_device
        from modellink_lora.models.spec import CausalAttention, RMSNorm, Swiglu

        super().__init__()
        group, qkv = dist.group.WORLD, shapes["linear_qkv"]
        device, hidden = get_device("cpu"), qkv.inputs
        config = TransformerConfig(
            num_layers=1, hidden_size=hidden, num_attention_heads=HEADS, params_dtype=qkv.dtype, attention_dropout=0.0
        )
        self.norms = torch.nn.ModuleList(RMSNorm(config, hidden, 1e-5, device=device) for _ in range(2))
        self.norms.requires_grad_(False)
        self.linears = torch.nn.ModuleDict({key: build(name, shape, group) for key, shape in shapes.items()})
        self.attention = CausalAttention(config, device=device, tp_rank=0)
        self.swiglu = Swiglu(config, device=device)
        self.heads = HEADS // group.size()

    def forward(self, x: Tensor) -> Tensor:
        """[s/t, b, h] -> the same"""
        q, k, v = self.linears["linear_qkv"](self.norms[0](x)).chunk(3, -1)  # [s, b, n/t * d]
        heads = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        x = x + self.linears["linear_proj"](self.attention(*heads, None))
        return x + self.linears["linear_fc2"](self.swiglu(self.linears["linear_fc1"](self.norms[1](x))))


def of_layer(name: str, p: float) -> int:
    """A decoder layer of a 7B model in bf16 on one rank of this group, under sequence parallelism if there are more."""
    sequence_parallel = dist.get_world_size() > 1
    with without_data():
        hidden, qkv, ffn = MODELS["7B"]
        shapes = decoder_layer(
            hidden, qkv, ffn, tokens=TOKENS, dtype=torch.bfloat16, dropout=p, sequence_parallel=sequence_parallel
        )
        layer = DecoderLayer(name, shapes)
        x = torch.randn(TOKENS // dist.get_world_size(), 1, hidden, dtype=torch.bfloat16).requires_grad_()
        with Saved() as saved:
            output = layer(x)
        kept = saved.bytes(without=layer.parameters())
        del output
        return kept


def layers(names: tuple[str, ...], dropouts: tuple[float, ...]) -> list[dict[str, Any]]:
    """For each peer: bytes of a decoder layer, and how much more that is than the frozen layer keeps."""
    frozen = of_layer("frozen", 0.0)
    rows = [{"peer": "frozen", "p": 0.0, "bytes": frozen, "added": 0.0}]
    for p in dropouts:
        for name in names:
            kept = of_layer(name, p)
            rows.append({"peer": name, "p": p, "bytes": kept, "added": kept / frozen - 1})
    return rows
