"""Column and row LoRA layers against unsharded fp64 autograd: output, gradients of X, A, B; plain and every level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.spawn import run

S, B, IN, OUT, R, SCALING, SITE = 16, 2, 24, 40, 3, 1.7, 99
SAMPLES = [7, 2**40 + 3]
TOLERANCE = 1e-12  # fp64: about 1e4 roundings of 1e-16


@dataclass(frozen=True)
class Case:
    kind: str  # column, row
    sequence_parallel: bool
    path: str  # plain, L0, L1, L2
    p: float = 0.0
    chunks: int = 1
    bias: str = "apart"  # none, apart, added
    flat: bool = False  # 2-D input
    gather_output: bool = False
    buffer: bool = False  # fp32 main_grad, here fp64, as under data parallelism; two backward passes fill it
    recompute: str = ""  # "producer" of the input, or the whole layer in a "checkpoint"
    mutant: str = ""


def problem(p: float) -> dict[str, Tensor]:
    """Inputs, and which elements dropout keeps."""
    from modellink_lora.device.hashing import dropped
    from modellink_lora.parallel.random import row_keys

    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (S, B, IN), "weight": (OUT, IN), "bias": (OUT,), "A": (R, IN), "B": (OUT, R), "dy": (S, B, OUT)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    rows = row_keys(SITE, torch.tensor(SAMPLES), torch.arange(S))
    kept = ~dropped(rows[..., None], torch.arange(IN, dtype=torch.int32), p) if p else torch.ones(S, B, IN)
    return tensors | {"kept": kept.double() / (1 - p)}


def reference(p: float, added: bool) -> dict[str, Tensor]:
    """What the layer must compute, written down without any parallelism."""
    t = problem(p)
    x, a, b = (t[k].requires_grad_() for k in ("x", "A", "B"))
    y = x @ t["weight"].T + SCALING * ((x * t["kept"]) @ a.T) @ b.T
    y = y + t["bias"] if added else y
    y.backward(t["dy"])
    assert x.grad is not None and a.grad is not None and b.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}


def sharded(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Each case on this world's tensor parallel layout; full tensors again."""
    import torch.distributed as dist

    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.parallel.context import make_context
    from modellink_lora.parallel.random import seed_everything

    context = make_context(
        ParallelConfig(tensor_model_parallel_size=dist.get_world_size()), torch.device("cpu")
    )  # fmt: skip
    seed_everything(1, context, get_device("cpu"))
    return [one(case, context.tp_size, context.tp_rank, context.tp_group) for case in cases]


def layer_of(case: Case, tensors: dict[str, Tensor], t: int, i: int, sp: bool) -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from modellink_lora.adapters.fused import FusedLoraLinear
    from modellink_lora.adapters.lora import LoraLinear
    from modellink_lora.device import get_device
    from modellink_lora.models.layouts import Column, Row, lora_layouts

    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=4, params_dtype=torch.float64, perform_initialization=False,
        tensor_model_parallel_size=t, sequence_parallel=sp, gradient_accumulation_fusion=False,
    )  # fmt: skip
    shared: dict[str, Any] = dict(
        config=config, init_method=lambda w: w, bias=case.bias != "none", skip_bias_add=case.bias == "apart"
    )
    layout: Column | Row
    if case.kind == "column":
        layout, base = Column(), ColumnParallelLinear(IN, OUT, gather_output=case.gather_output, **shared)
    else:
        layout, base = Row(), RowParallelLinear(IN, OUT, input_is_parallel=True, **shared)
    a_layout, b_layout = lora_layouts(layout)
    with torch.no_grad():
        base.weight.copy_(layout.shard(tensors["weight"], i, t))
        if base.bias is not None:
            base.bias.copy_(layout.shard(tensors["bias"], i, t) if case.kind == "column" else tensors["bias"])
    base.requires_grad_(False)
    settings: dict[str, Any] = dict(
        lora_A=a_layout.shard(tensors["A"], i, t).clone(), lora_B=b_layout.shard(tensors["B"], i, t).clone(),
        scaling=SCALING, dropout=case.p,
    )  # fmt: skip
    if case.path == "plain":
        layer = LoraLinear(base, **settings)
    else:
        layer = FusedLoraLinear(
            base, device=get_device("cpu"), level=case.path, chunks=lambda rows: case.chunks,
            recompute_inputs=case.recompute == "producer", **settings,
        )  # fmt: skip
    layer.dropout.site = SITE
    return layer


def one(case: Case, t: int, i: int, group: Any) -> dict[str, Tensor]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import checkpoint

    from modellink_lora.models.recompute import remember
    from modellink_lora.parallel.random import set_samples

    column, sp = case.kind == "column", case.sequence_parallel and t > 1
    tensors = problem(case.p)
    layer = layer_of(case, tensors, t, i, sp)
    set_samples(torch.tensor(SAMPLES))

    def tokens(full: Tensor) -> Tensor:
        return full.chunk(t, dim=0)[i]

    def width(full: Tensor) -> Tensor:
        return full.chunk(t, dim=-1)[i]

    x = tensors["x"] if column else width(tensors["x"])
    dy = width(tensors["dy"]) if column and not case.gather_output else tensors["dy"]
    if sp:
        x, dy = (tokens(x), dy) if column else (x, tokens(dy))
    x = x.clone().requires_grad_()
    if case.buffer:
        for factor in (layer.lora_A, layer.lora_B):
            factor.main_grad = torch.zeros_like(factor)
    for _ in range(2 if case.buffer else 1):
        x.grad = None
        entering = x.flatten(0, 1) if case.flat else x
        if case.recompute == "producer":
            entering = remember(entering * 1.0, lambda y: y * 1.0, entering)
        if case.recompute == "checkpoint":
            y, bias = checkpoint(layer, False, entering)
            set_samples(torch.tensor([0, 1]))  # others have passed before the backward pass
        else:
            y, bias = layer(entering)
        assert (bias is layer.base_layer.bias) if case.bias == "apart" else (bias is None)
        y = y.unflatten(0, (-1, B)) if case.flat else y
        y.backward(dy.contiguous())
        set_samples(torch.tensor(SAMPLES))
    found = []
    for factor in (layer.lora_A, layer.lora_B):
        gradient = factor.main_grad / 2 if case.buffer and case.path != "plain" else factor.grad
        if getattr(factor, "partial_over_tensor_ranks", False) and case.mutant != "no sum of the replicated factor":
            dist.all_reduce(gradient, group=group)  # what training/optimizer.py does once for each global batch
        found.append(gradient)

    def gather(part: Tensor, dim: int, when: bool) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(t)]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=dim) if when else part

    assert x.grad is not None
    return {
        "y": gather(y.detach(), -1 if column else 0, (column and not case.gather_output) or (sp and not column)),
        "dx": gather(x.grad, 0 if column else -1, sp if column else True),
        "dA": gather(found[0], 1, not column),
        "dB": gather(found[1], 0, column),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def cases(t: int) -> list[Case]:
    """Every path on every shape of parallelism, with and without dropout, then each feature on all of them."""
    both = [Case(kind, sp, "plain", p) for kind in ("column", "row") for sp in (False, True) for p in (0.0, 0.1)]
    found = list(both)
    for case in both:
        bordered = ("L1", "L2") if case.sequence_parallel and t > 1 else ()
        for level in ("L0", *bordered):
            if level == "L2" and case.kind == "row" and case.p:
                continue  # x itself would have to stand below W
            one = replace(case, path=level)
            found += [one, replace(one, chunks=2), replace(one, chunks=3)]
            found += [replace(one, recompute="producer"), replace(one, recompute="checkpoint", bias="added")]
            found += [replace(one, bias=bias) for bias in ("none", "added")] + [replace(one, buffer=True)]
            if not case.p:
                found.append(replace(one, flat=True, chunks=2))
            if case.kind == "column" and not case.sequence_parallel:
                found.append(replace(one, gather_output=True))
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_output_and_gradients_equal_unsharded_autograd(tp: int) -> None:
    expected = {key: reference(*key) for key in ((p, added) for p in (0.0, 0.1) for added in (False, True))}
    wrong = []
    for rank, results in enumerate(run(sharded, world_size=tp, cases=cases(tp))):
        for case, found in zip(cases(tp), results, strict=True):
            errors = {k: relative(found[k], v) for k, v in expected[case.p, case.bias == "added"].items()}
            wrong += [(rank, case, name, error) for name, error in errors.items() if not error < TOLERANCE]
    assert wrong == []


@pytest.mark.parametrize("path, sequence_parallel", [("plain", True), ("L0", False), ("L2", True)])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_the_comparison_notices_a_gradient_that_is_not_summed(kind: str, path: str, sequence_parallel: bool) -> None:
    expected = reference(0.0, False)
    case = Case(kind, sequence_parallel, path, mutant="no sum of the replicated factor")
    found = run(sharded, world_size=2, cases=[case])[0][0]
    replicated = "dA" if kind == "column" else "dB"
    assert relative(found[replicated], expected[replicated]) > 1e-3
