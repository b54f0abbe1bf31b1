"""What bf16 leaves of a small update: its share in the output, and the error of the branch before it is added.

Letters: W frozen weight of std 0.02, A and B factors with B of std 1e-5, delta the exact update in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.layers import Shape
from benchmarks.peers import build

B_STD = 1e-5


def share(found: Tensor, frozen: Tensor, delta: Tensor) -> float:
    """Part of delta that is in found - frozen: <found - frozen, delta> / <delta, delta>. 1: all of it."""
    change = found.detach().double() - frozen.detach().double()
    return float((change * delta).sum() / (delta * delta).sum())


def survival(kind: str, names: tuple[str, ...], tokens: int, width: int) -> dict[str, dict[str, float]]:
    """Of one rank's output of a bf16 linear under sequence parallelism, for each peer.

    The error of the branch is read with W = 0, where the output is the branch alone; a merged weight's is that of the
    branch which the rounded weight's difference from W makes.
    """
    group = dist.group.WORLD
    shape = Shape(kind, tokens, width, width, dtype=torch.bfloat16, sequence_parallel=group.size() > 1)
    generator = torch.Generator().manual_seed(3 + group.rank())
    x = torch.randn(shape.input_of(group.size()), generator=generator).bfloat16()
    found = {}
    for name in names:
        layer, frozen = build(name, shape, group, std=B_STD), build("frozen", shape, group)  # of the same weight
        a, b, weight = factors_of(layer)
        with torch.no_grad():
            delta = exact_update(shape, x, a, b)
            kept = share(layer(x), frozen(x), delta)
            if name == "merged":
                change = (weight + (b @ (a * shape.scaling)).to(weight.dtype)).double() - weight.double()
                branch = (
                    summed(shape, x.double() @ change.t()) if kind == "row" else whole(shape, x).double() @ change.t()
                )
            else:
                weight.zero_()
                branch = layer(x).double()
        found[name] = {"share": kept, "branch_error": float((branch - delta).norm() / delta.norm())}
    return found


def exact_update(shape: Shape, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """scaling * X A^T B^T of this rank's part of the output, in fp64."""
    a, b = a.detach().double(), b.detach().double()
    low = whole(shape, x).double() @ a.t() if shape.kind == "column" else summed(shape, x.double() @ a.t())
    return shape.scaling * (low @ b.t())


def whole(shape: Shape, x: Tensor) -> Tensor:
    """All ranks' tokens."""
    if not shape.sequence_parallel:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def summed(shape: Shape, partial: Tensor) -> Tensor:
    """This rank's tokens of the sum over ranks."""
    if not shape.sequence_parallel:
        return partial
    dist.all_reduce(partial)
    return partial.chunk(dist.get_world_size())[dist.get_rank()]


def factors_of(layer: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the frozen weight of any layer of `build`."""
    named = dict(layer.named_parameters())

    def find(part: str) -> Tensor:
        return next(value for name, value in named.items() if part in name)

    return find("lora_A"), find("lora_B"), layer.weight if hasattr(layer, "weight") else find("base_layer.weight")


def mean(ranks: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Over ranks."""
    return {
        name: {key: sum(rank[name][key] for rank in ranks) / len(ranks) for key in ranks[0][name]} for name in ranks[0]
    }
