"""The same parallel LoRA linear as others compute it, written from their published equations, and ours beside them.

Letters: x input, S = x A^T, U = dY B, s scaling, W, A, B this rank's shards, r rank; SP sequence parallel.
Every layer here takes x [s(/t), b, i(/t)] and gives Y [s(/t), b, o(/t)].

    frozen      megatron-core's linear alone.
    plain       this project's adapters/lora.py: r-wide collectives one after the other, as in PEFT's parallel layer.
    cclora      ModelLink's schedule: r-wide collectives launched beside the base product, s folded into A, dropout left
                out, and with the term s U A added to dX, which the original forgets.
    merged      the schedule that multiplies by W + B (s A), rounded to W's dtype, and communicates S and U for the
                gradients only.
    peft        Hugging Face PEFT around torch.nn.Linear: one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.layers import Shape, make_base, make_factors


class First(torch.nn.Module):
    """A parallel linear without its second result, the bias that it leaves to others."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def gather(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    """All ranks' rows below each other, and what to wait for."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return out, dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True)


def scatter(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    """This rank's rows of the sum over ranks, and what to wait for."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return out, dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True)


def reduce(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    return x, dist.all_reduce(x, group=group, async_op=True)


class _Nothing:
    def wait(self) -> None:
        pass


def _alone(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    return x, _Nothing()


Move = Callable[[Tensor, Any], tuple[Tensor, Any]]


def moves(column: bool, sequence_parallel: bool, ranks: int) -> tuple[Move, Move]:
    """What the frozen linear does to its input on the way in, and to its output on the way out; transposed in backward.

    Column: (gather, nothing) forward, so (nothing, scatter) backward; row the other way round.
    """
    if ranks == 1:
        return _alone, _alone
    entry, leave = (gather, scatter) if sequence_parallel else (_alone, reduce)
    return (entry, _alone) if column else (_alone, leave)


class _CCLora(torch.autograd.Function):
    """Forward and backward of `cclora` (merges=False) and `merged` (merges=True)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: CCLora) -> Tensor:
        group, column, sp = layer.group, layer.column, layer.sequence_parallel
        scaled = a * layer.scaling  # [r, i]
        low = x @ scaled.t()  # [s(/t), b, r]
        entry, leave = layer.moves
        weight = layer.weight + (b @ scaled).to(layer.weight.dtype) if layer.merges else layer.weight
        # columns need S of all tokens in forward; merged ones only for dB, and gather it there
        small, work = entry(low, group) if column and not layer.merges else (low, _Nothing())
        if not column:  # summed over ranks: for Y, or when merged for dB only
            small, work = leave(low, group)
        whole, done = entry(x, group)
        done.wait()
        y = whole @ weight.t()
        y, done = leave(y, group)
        work.wait()
        done.wait()
        if not layer.merges:
            y = y + small @ b.t()
        kept = low if column and sp else small  # this rank's tokens: the whole is gathered again in backward
        ctx.save_for_backward(x, kept, a, b, *((weight,) if layer.merges else ()))
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        layer = ctx.layer
        x, small, a, b, *merged = ctx.saved_tensors
        group, column, ranks = layer.group, layer.column, layer.group.size()
        scaled, weight = a * layer.scaling, merged[0] if merged else layer.weight
        gathers = layer.sequence_parallel and ranks > 1
        entry = gather if gathers else _alone
        low = small
        if column:
            leave = scatter if gathers else reduce if ranks > 1 else _alone
            low, first = entry(small, group)
            up, second = leave(dy @ b, group)
            dx, done = leave(dy @ weight, group)
            for work in (first, second, done):
                work.wait()
        else:
            whole, done = entry(dy, group)
            done.wait()
            up = whole @ b  # of all tokens: no collective of its own, but t times the products of a share
            dx = whole @ weight
        if not layer.merges:
            dx = dx + up @ scaled
        flat_up, flat_x = up.flatten(0, 1), x.flatten(0, 1)
        da = (flat_up.t() @ flat_x) * layer.scaling
        db = dy.flatten(0, 1).t() @ low.flatten(0, 1)
        return dx, da, db, None


class CCLora(torch.nn.Module):
    """Column or row linear in the schedule of `cclora` or `merged`."""

    def __init__(self, base: torch.nn.Module, a: Tensor, b: Tensor, shape: Shape, *, merges: bool) -> None:
        super().__init__()
        self.weight, self.group, self.scaling, self.merges = base.weight, base.tp_group, shape.scaling, merges
        self.column, self.sequence_parallel = shape.kind == "column", bool(base.sequence_parallel)
        self.moves = moves(self.column, self.sequence_parallel, self.group.size())
        self.lora_A, self.lora_B = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return _CCLora.apply(x, self.lora_A, self.lora_B, self)


class Peft(torch.nn.Module):
    """Real `peft` around one torch.nn.Linear that holds the same weight."""

    def __init__(self, base: torch.nn.Module, a: Tensor, b: Tensor, shape: Shape, *, fp32_adapters: bool) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        linear = torch.nn.Linear(shape.inputs, shape.outputs, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(base.weight.detach(), requires_grad=False)
        config = LoraConfig(
            r=shape.rank, lora_alpha=int(shape.scaling * shape.rank), lora_dropout=shape.dropout,
            target_modules=["linear"],
        )  # fmt: skip
        holder = torch.nn.ModuleDict({"linear": linear})
        model = get_peft_model(holder, config, autocast_adapter_dtype=fp32_adapters)
        self.linear = model.base_model.model["linear"]
        with torch.no_grad():
            self.linear.lora_A["default"].weight.copy_(a)
            self.linear.lora_B["default"].weight.copy_(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def plain(base: torch.nn.Module, a: Tensor, b: Tensor, shape: Shape) -> torch.nn.Module:
    from modellink_lora.adapters.lora import LoraLinear

    layer = LoraLinear(base, lora_A=a, lora_B=b, scaling=shape.scaling, dropout=shape.dropout)
    return First(_with_samples(layer))


def fused(
    base: torch.nn.Module, a: Tensor, b: Tensor, shape: Shape, *, level: str, chunks: int = 1,
    recompute_inputs: bool = False, device: str = "cpu",
) -> torch.nn.Module:  # fmt: skip
    """Ours; level "auto" is the one that a training run would choose."""
    from modellink_lora.adapters.fused import FusedLoraLinear, decide
    from modellink_lora.device import get_device

    if level == "auto":
        level = decide(base, dropout=shape.dropout).level
    return First(_with_samples(FusedLoraLinear(
        base, lora_A=a, lora_B=b, scaling=shape.scaling, dropout=shape.dropout, device=get_device(device), level=level,
        chunks=lambda rows: chunks, recompute_inputs=recompute_inputs,
    )))  # fmt: skip


def _with_samples(layer: torch.nn.Module) -> torch.nn.Module:
    """Dropout hashes its masks from a site and from sample numbers, which a training job sets."""
    from modellink_lora.parallel.random import set_samples

    layer.dropout.site = 1
    set_samples(torch.zeros(1, dtype=torch.int64, device=layer.lora_A.device))
    return layer


def build(name: str, shape: Shape, group: Any, device: str = "cpu", *, std: float = 0.01) -> torch.nn.Module:
    """A layer by name: frozen, plain, cclora, merged, peft, peft fp32 (its adapters' dtype), or ours.

    Ours is a level, L0, L1, L2, auto, or "L2/L0" for column/row, then "c2" or "c4" for chunks and "recompute" for
    inputs that are made again in backward.
    """
    torch.manual_seed(7)
    base = make_base(shape, group, device)
    if name == "frozen":
        return First(base)
    a, b = make_factors(shape, group, std=std, device=device)
    if name == "plain":
        return plain(base, a, b, shape)
    if name in ("cclora", "merged"):
        return CCLora(base, a, b, shape, merges=name == "merged")
    if name.startswith("peft"):
        return Peft(base, a, b, shape, fp32_adapters=name.endswith("fp32"))
    levels, *options = name.split()
    level = levels.split("/")[-1 if shape.kind == "row" else 0]
    chunks = next((int(option[1:]) for option in options if option in ("c1", "c2", "c4")), 1)
    return fused(base, a, b, shape, level=level, chunks=chunks, recompute_inputs="recompute" in options, device=device)
