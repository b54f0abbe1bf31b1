"""The peers that benchmarks compare with compute the right thing: a faster wrong answer is no peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.spawn import run

T, I, O, R = 8, 24, 40, 4  # noqa: E741  # tokens, inputs, outputs, rank


def gradients(kind: str, sequence_parallel: bool, peers: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Output and gradients of this rank's shards, the replicated factor's summed as a training run does."""
    import torch.distributed as dist

    from benchmarks.layers import Shape, make_case
    from benchmarks.peers import build

    group = dist.group.WORLD
    shape = Shape(kind, T, I, O, rank=R, dtype=torch.float64, sequence_parallel=sequence_parallel and group.size() > 1)
    found: dict[str, dict[str, Tensor]] = {}
    for peer in peers:
        layer = build(peer, shape, group, std=1.0)
        torch.manual_seed(11 + (group.rank() if shape.sequence_parallel else 0))  # else all ranks see all tokens
        case = make_case(shape, layer, group)
        y = case.forward()
        y.backward(case.dy)
        found[peer] = {"y": y.detach(), "dx": case.x.grad}  # type: ignore[dict-item]
        for name, parameter in layer.named_parameters():
            factor = "A" if "lora_A" in name else "B" if "lora_B" in name else None
            if factor:
                grad: Any = parameter.grad
                shared = factor == ("A" if kind == "column" else "B")
                if shared and (shape.sequence_parallel or getattr(parameter, "partial_over_tensor_ranks", False)):
                    dist.all_reduce(grad)
                found[peer][f"d{factor}"] = grad
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_every_peer_equals_the_plain_layer(kind: str, sequence_parallel: bool, tp: int) -> None:
    peers = ("plain", "cclora", "merged", "auto", "auto c2", *(("peft",) if tp == 1 else ()))
    for found in run(gradients, world_size=tp, kind=kind, sequence_parallel=sequence_parallel, peers=peers):
        for peer in peers[1:]:
            for name, expected in found["plain"].items():
                error = float((found[peer][name] - expected).abs().max() / expected.abs().max())
                assert error < 1e-12, (peer, name, error)
