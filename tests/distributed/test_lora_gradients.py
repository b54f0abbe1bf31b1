"""Column and row LoRA layers against unsharded fp64 autograd: output and gradients of X, A and B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.spawn import run

S, B, IN, OUT, R, SCALING = 8, 2, 24, 40, 3, 1.7
TOLERANCE = 1e-12  # fp64: about 1e4 roundings of 1e-16


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (S, B, IN), "weight": (OUT, IN), "bias": (OUT,), "A": (R, IN), "B": (OUT, R), "dy": (S, B, OUT)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def reference() -> dict[str, Tensor]:
    """What the layer must compute, written down without any parallelism."""
    p = problem()
    x, a, b = (p[k].requires_grad_() for k in ("x", "A", "B"))
    y = x @ p["weight"].T + SCALING * (x @ a.T) @ b.T
    y.backward(p["dy"])
    assert x.grad is not None and a.grad is not None and b.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}


def sharded(kind: str, sequence_parallel: bool, mutant: str | None = None) -> dict[str, Tensor]:
    """The same through LoraLinear on this world's tensor parallel layout; full tensors again."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from modellink_lora.adapters.lora import LoraLinear
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.models.layouts import Column, Row, lora_layouts
    from modellink_lora.parallel.context import make_context

    context = make_context(
        ParallelConfig(tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=sequence_parallel),
        torch.device("cpu"),
    )
    t, i = context.tp_size, context.tp_rank
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=4, params_dtype=torch.float64, perform_initialization=False,
        tensor_model_parallel_size=t, sequence_parallel=context.sequence_parallel, gradient_accumulation_fusion=False,
    )  # fmt: skip
    shared: dict[str, Any] = dict(config=config, init_method=lambda w: w, bias=True, skip_bias_add=True)
    layout: Column | Row
    if kind == "column":
        layout, base = Column(), ColumnParallelLinear(IN, OUT, gather_output=False, **shared)
    else:
        layout, base = Row(), RowParallelLinear(IN, OUT, input_is_parallel=True, **shared)
    p = problem()
    a_layout, b_layout = lora_layouts(layout)
    with torch.no_grad():
        base.weight.copy_(layout.shard(p["weight"], i, t))
    base.requires_grad_(False)
    layer = LoraLinear(
        base, lora_A=a_layout.shard(p["A"], i, t).clone(), lora_B=b_layout.shard(p["B"], i, t).clone(), scaling=SCALING
    )
    cut_tokens = context.sequence_parallel

    def tokens(full: Tensor) -> Tensor:
        return full.chunk(t, dim=0)[i]

    def width(full: Tensor) -> Tensor:
        return full.chunk(t, dim=-1)[i]

    x = p["x"] if kind == "column" else width(p["x"])
    dy = width(p["dy"]) if kind == "column" else p["dy"]
    if cut_tokens and kind == "column":
        x = tokens(x)
    if cut_tokens and kind == "row":
        dy = tokens(dy)
    x = x.clone().requires_grad_()
    y, bias = layer(x)
    assert bias is base.bias, "a bias that the base leaves apart stays apart"
    y.backward(dy.contiguous())
    for factor in (layer.lora_A, layer.lora_B):
        if getattr(factor, "sequence_parallel", False) and mutant != "no sum of the replicated factor":
            dist.all_reduce(factor.grad, group=context.tp_group)  # what finalize_model_grads does

    def gather(part: Tensor, dim: int, when: bool) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(t)]
        dist.all_gather(parts, part.contiguous(), group=context.tp_group)
        return torch.cat(parts, dim=dim) if when else part

    column = kind == "column"
    assert x.grad is not None and layer.lora_A.grad is not None and layer.lora_B.grad is not None
    return {
        "y": gather(y.detach(), -1 if column else 0, column or cut_tokens),
        "dx": gather(x.grad, 0 if column else -1, cut_tokens if column else True),
        "dA": gather(layer.lora_A.grad, 1, not column),
        "dB": gather(layer.lora_B.grad, 0, column),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_output_and_gradients_equal_unsharded_autograd(tp: int, kind: str, sequence_parallel: bool) -> None:
    expected = reference()
    for rank, found in enumerate(run(sharded, world_size=tp, kind=kind, sequence_parallel=sequence_parallel)):
        for name in expected:
            assert relative(found[name], expected[name]) < TOLERANCE, (rank, name)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_the_comparison_notices_a_gradient_that_is_not_summed(kind: str) -> None:
    expected = reference()
    found = run(sharded, world_size=2, kind=kind, sequence_parallel=True, mutant="no sum of the replicated factor")
    replicated = "dA" if kind == "column" else "dB"
    assert relative(found[0][replicated], expected[replicated]) > 1e-3
