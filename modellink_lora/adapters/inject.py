"""Puts LoRA layers into a built model: freezes the base, wraps the targets, draws A from its global name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from modellink_lora.adapters.fused import FusedLoraLinear, Fusion, make_layer
from modellink_lora.adapters.lora import LoraLinear
from modellink_lora.adapters.targets import AdaptedLinear
from modellink_lora.models.build import GPT
from modellink_lora.models.finite import check_weight
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.parallel.partition import Partition
from modellink_lora.parallel.random import kaiming_uniform

# Reads the frozen embeddings through a frozen norm: the gradient of its input is of use to nobody.
FIRST = "decoder.layers.0.self_attention.linear_qkv"


def inject(
    model: GPT,
    linears: list[AdaptedLinear],
    context: ParallelContext,
    partition: Partition,
    chunk: int,
    *,
    dtype: torch.dtype,
    dropout: float,
    read: Callable[[str], Tensor],
    fusion: Fusion | None = None,
) -> dict[str, LoraLinear]:
    """Freeze `model`, a chunk of this stage, and wrap its share of `linears`: global module name -> its layer.

    Args:
        read: global name of a factor -> full tensor; `fresh` for a new adapter.
        fusion: None for the plain path.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped = {}
    for linear in linears:
        if not partition.holds(linear.name, context.pp_rank, chunk):
            continue
        parent_name, _, leaf = partition.to_local(linear.name, context.pp_rank, chunk).rpartition(".")
        parent = model.get_submodule(parent_name)

        def shard(factor: str, linear: AdaptedLinear = linear) -> Tensor:
            layout = linear.a_layout if factor == "lora_A" else linear.b_layout
            full = read(f"{linear.name}.{factor}")
            check_weight(full, dtype, f"{linear.name}.{factor}")
            part = layout.shard(full, context.tp_rank, context.tp_size)
            return part.to(device=context.device, dtype=dtype, copy=True).contiguous()

        layer = make_layer(
            getattr(parent, leaf),
            fusion,
            lora_A=shard("lora_A"),
            lora_B=shard("lora_B"),
            scaling=linear.scaling,
            dropout=dropout,
        )
        if isinstance(layer, FusedLoraLinear) and linear.name == FIRST:
            layer.input_is_constant = True
        setattr(parent, leaf, layer)
        wrapped[linear.name] = layer
    return wrapped


def fresh(linears: list[AdaptedLinear], seed: int) -> Callable[[str], Tensor]:
    """A reader of new factors: A as in `kaiming_uniform`, drawn from (seed, name), B zero."""
    by_name: Mapping[str, AdaptedLinear] = {linear.name: linear for linear in linears}

    def read(name: str) -> Tensor:
        module, _, factor = name.rpartition(".")
        linear = by_name[module]
        if factor == "lora_A":
            return kaiming_uniform(name, (linear.r, linear.in_features), seed=seed)
        return torch.zeros(linear.out_features, linear.r)

    return read
