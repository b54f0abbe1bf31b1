"""CCLoRA: the frozen linear and its adapter in one autograd function, without a collective of the adapter's own.

Letters: n tokens of this rank, T tokens of all ranks together (T = n without sequence parallelism, SP), i inputs, o
outputs, r rank, t tensor parallel size, p dropout, M mask, s = scaling / (1 - p), S = (M x) A^T, U = dY B. W, A and B
are this rank's shards. Gradients are those of adapters/lora.py:

    Y = x W^T + s S B^T      dX = dY W + s M (U A)      dA = s U^T (M x)      dB = s dY^T S

What is sent, besides the frozen linear's own collective: nothing, or the r columns of S or U inside it.
    L0  no wider buffer. The r-wide product is added to the partial result before the frozen linear's reduction:
        a column linear adds s M (U A) to dY W, a row linear adds s S B^T to x W^T, and each sum is reduced once.
        Under SP a column linear gathers x as ever and needs U summed over ranks: one small reduce-scatter of its own.
    L1  under SP: S or U rides in a border of the buffer that is gathered or reduce-scattered anyway.
    L2  as L1, and W lies in a storage with the same border, so that one product makes, or uses up, the whole buffer:
        column: [x | s S] [W | B]^T and dY [W | B];   row (p = 0): x [W ; A]^T and [dY | s U] [W ; A].
The gradient of the factor that all ranks hold (column: A, row: B) stays this rank's share; training/optimizer.py sums
it once for each global batch.

Order matters where 16 bits are rounded: the r-wide product is made first and x W^T accumulated onto it, so that the sum
is rounded once and updates below half a unit of Y are not lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.device.lora_ops import Mask
from modellink_lora.models.recompute import Recipe
from modellink_lora.parallel import overlap
from modellink_lora.parallel.overlap import block, multiply

if TYPE_CHECKING:
    from modellink_lora.adapters.fused import FusedLoraLinear

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, None, None]


class _Fused(torch.autograd.Function):
    """What the functions share. Inputs: x [..., i], lora_A, lora_B, the layer, a recipe for x or None."""

    @staticmethod
    def keep(
        ctx: Any, x: Tensor, low: Tensor, layer: FusedLoraLinear, recipe: Recipe | None, mask: Mask | None
    ) -> None:
        """Save s S, and x or what x can be made from again. Of the mask its keys are kept, a number a row."""
        keys = () if mask is None else (mask.rows, mask.columns)
        # the factors are saved for autograd's check that nobody changed them before the backward pass
        ctx.save_for_backward(layer.lora_A, layer.lora_B, low, *keys, *((x,) if recipe is None else recipe.inputs))
        # of the recipe the function only: unlike saved tensors, what hangs on ctx outlives the backward pass
        ctx.layer, ctx.function, ctx.shape = layer, recipe and recipe.function, x.shape
        ctx.p, ctx.scale = mask.p if mask else 0.0, layer.scale

    @staticmethod
    def kept(ctx: Any) -> tuple[Tensor, Mask | None, Tensor]:
        """s S, the mask and x [n or T, i]."""
        _, _, low, *rest = ctx.saved_tensors
        mask = None
        if ctx.p:
            mask, rest = Mask(rest[0], rest[1], ctx.p), rest[2:]
        x = rest[0] if ctx.function is None else ctx.function(*rest)
        return low, mask, x.reshape(-1, x.shape[-1])

    @staticmethod
    def finish(ctx: Any, dx: Tensor | None, dA: Tensor, dB: Tensor) -> Grads:
        layer = ctx.layer
        return (
            None if dx is None else dx.view(ctx.shape),
            _deliver(layer.lora_A, dA) if ctx.needs_input_grad[1] else None,
            _deliver(layer.lora_B, dB) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _deliver(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Add a gradient to the parameter's fp32 buffer if it has one, else return it to autograd."""
    buffer = getattr(parameter, "main_grad", None)
    if buffer is None:
        return gradient.to(parameter.dtype)
    buffer.add_(gradient)
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # megatron-core then ignores what follows
    return torch.empty_like(parameter)


class Unbordered(_Fused):
    """L0 of every case; also the row linear under SP, whose share s S B^T is added before the reduce-scatter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, layer: FusedLoraLinear, recipe: Recipe | None
    ) -> Tensor:
        A, B = layer.factors()
        W, ops, t = layer.base_layer.weight, layer.device.lora_ops, layer.ranks
        gathers = layer.is_column and layer.sequence_parallel
        flat, mask = x.reshape(-1, x.shape[-1]), layer.mask(x, whole=gathers)
        if gathers:
            out, low = flat.new_empty(t * len(flat), len(W)), flat.new_empty(t * len(flat), len(A))

            def consume(rows: slice, gathered: Tensor) -> None:
                part = ops.down(gathered.flatten(0, 1), A, _rows_of(mask, t, rows), layer.scale).view(t, -1, len(A))
                block(low, t, rows).copy_(part)
                into = block(out, t, rows)
                multiply(part, B.t(), into)
                multiply(gathered, W.t(), into, onto=1.0)

            overlap.gather(flat, layer.tp_group, layer.chunks(len(flat)), consume)
        else:
            low = ops.down(flat, A, mask, layer.scale)

            def produce(rows: slice, partial: Tensor) -> None:
                multiply(block(low, len(partial), rows), B.t(), partial)
                multiply(block(flat, len(partial), rows), W.t(), partial, onto=1.0)

            out = layer.leave(flat, len(W), produce, reduces=not layer.is_column)
        layer.add_bias(out)
        _Fused.keep(ctx, x, low, layer, recipe, mask)
        return out.view(*layer.leading(x.shape), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:  # type: ignore[override]
        low, mask, x = _Fused.kept(ctx)
        layer = ctx.layer
        A, B = layer.factors()
        W, ops, t = layer.base_layer.weight, layer.device.lora_ops, layer.ranks
        dy, needs_dx = grad.reshape(-1, grad.shape[-1]), layer.needs_input_grad(ctx)
        dx: Tensor | None = None

        def input_gradient(U: Tensor, dy: Tensor, mask: Mask | None, into: Tensor) -> None:
            multiply(U, A, into)
            if mask is not None:
                into.masked_fill_(mask.dropped().view(into.shape), 0)
            multiply(dy, W, into, onto=ctx.scale)

        if not layer.is_column and layer.sequence_parallel:
            U, dB = dy.new_empty(len(x), len(A)), torch.zeros_like(B)
            dx = x.new_empty(x.shape) if needs_dx else None

            def consume(rows: slice, gathered: Tensor) -> None:
                part, share = ops.up_gradients(gathered.flatten(0, 1), B, block(low, t, rows).flatten(0, 1))
                dB.add_(share)
                part = part.view(t, -1, len(A))
                block(U, t, rows).copy_(part)
                if dx is not None:
                    input_gradient(part, gathered, _rows_of(mask, t, rows), block(dx, t, rows))

            overlap.gather(dy, layer.tp_group, layer.chunks(len(dy)), consume)
            return _Fused.finish(ctx, dx, ops.down_gradient(U, x, mask, ctx.scale), dB)

        U, dB = ops.up_gradients(dy, B, low)
        own, under_way = U, None
        if layer.is_column and layer.sequence_parallel:  # the one collective that L0 adds
            own = U.new_empty(len(x), len(A))
            under_way = dist.reduce_scatter_tensor(own, U, group=layer.tp_group, async_op=True)
        if needs_dx:

            def produce(rows: slice, partial: Tensor) -> None:
                ranks = len(partial)
                part = block(U, ranks, rows)
                input_gradient(part, block(dy, ranks, rows), _rows_of(mask, ranks, rows), partial)

            dx = layer.leave(dy, x.shape[1], produce, reduces=layer.is_column)
        if under_way is not None:
            under_way.wait()
            mask = _rows_of_rank(mask, t, layer.tp_group.rank())
        return _Fused.finish(ctx, dx, ops.down_gradient(own, x, mask, ctx.scale), dB)


class ColumnBordered(_Fused):
    """L1 and L2 of a column linear under SP: S rides in the gather of x, U in the reduce-scatter of dY W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, layer: FusedLoraLinear, recipe: Recipe | None
    ) -> Tensor:
        A, B = layer.factors()
        W, wide, t, i, r = layer.base_layer.weight, layer.refreshed_border(B), layer.ranks, x.shape[-1], len(A)
        flat, mask = x.reshape(-1, i), layer.mask(x)
        buffer = flat.new_empty(len(flat), i + layer.border)
        buffer[:, :i].copy_(flat)
        _fill_border(buffer[:, i:], layer.device.lora_ops.down(flat, A, mask, layer.scale))
        out, low = flat.new_empty(t * len(flat), len(W)), flat.new_empty(t * len(flat), r)

        def consume(rows: slice, gathered: Tensor) -> None:
            into = block(out, t, rows)
            if wide is not None:
                multiply(gathered, wide.t(), into)
            else:
                multiply(gathered[..., i : i + r], B.t(), into)
                multiply(gathered[..., :i], W.t(), into, onto=1.0)
            block(low, t, rows).copy_(gathered[..., i : i + r])

        done = layer.device.gather_matmul(buffer, wide, layer.tp_group) if wide is not None else None
        if done is not None:
            out = done[0]
            low.copy_(done[1][:, i : i + r])
        else:
            overlap.gather(buffer, layer.tp_group, layer.chunks(len(flat)), consume)
        layer.add_bias(out)
        _Fused.keep(ctx, x, low, layer, recipe, mask)
        return out.view(*layer.leading(x.shape), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:  # type: ignore[override]
        low, mask, x = _Fused.kept(ctx)
        layer = ctx.layer
        A, B = layer.factors()
        W, wide, t, i, r = layer.base_layer.weight, layer.wide, layer.ranks, x.shape[1], len(A)
        dy, ops = grad.reshape(-1, grad.shape[-1]), layer.device.lora_ops
        # a model's first layer: nothing reads dX, so the frozen linear's reduce-scatter shrinks to its border
        first = i if layer.needs_input_grad(ctx) else 0

        def produce(rows: slice, partial: Tensor) -> None:
            of = block(dy, t, rows)
            if wide is not None and first:
                multiply(of, wide, partial)
                return
            if first:
                multiply(of, W, partial[..., :i])
            multiply(of, B, partial[..., first : first + r])
            partial[..., first + r :].zero_()

        done = layer.device.matmul_scatter(dy, wide.t(), layer.tp_group) if wide is not None and first else None
        if done is None:
            shape = (len(x), first + layer.border)
            done = overlap.scatter(dy, shape, layer.tp_group, layer.chunks(len(x)), produce)
        u = done[:, first : first + r]
        dx = None
        if first and mask is None:
            dx = torch.addmm(done[:, :i], u, A, alpha=ctx.scale)
        elif first:
            dx = done[:, :i].contiguous()
            ops.add_input_gradient(dx, u, A, ctx.scale, mask)
        return _Fused.finish(ctx, dx, ops.down_gradient(u, x, mask, ctx.scale), dy.t() @ low)


class RowBordered(_Fused):
    """L1 and L2 of a row linear under SP: S rides in the reduce-scatter of x W^T, U in the gather of dY."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, layer: FusedLoraLinear, recipe: Recipe | None
    ) -> Tensor:
        A, B = layer.factors()
        W, wide, t, r = layer.base_layer.weight, layer.refreshed_border(A), layer.ranks, len(A)
        flat, mask, o = x.reshape(-1, x.shape[-1]), layer.mask(x), len(W)
        lows = None if wide is not None else layer.device.lora_ops.down(flat, A, mask)

        def produce(rows: slice, partial: Tensor) -> None:
            of = block(flat, t, rows)
            if lows is None:
                multiply(of, wide.t(), partial)  # type: ignore[union-attr]
                return
            multiply(of, W.t(), partial[..., :o])
            partial[..., o : o + r].copy_(block(lows, t, rows))
            partial[..., o + r :].zero_()

        done = layer.device.matmul_scatter(flat, wide, layer.tp_group) if wide is not None else None
        if done is None:
            shape = (len(flat) // t, o + layer.border)
            done = overlap.scatter(flat, shape, layer.tp_group, layer.chunks(shape[0]), produce)
        low = done[:, o : o + r] * layer.scale
        out = torch.addmm(done[:, :o], low, B.t())
        layer.add_bias(out)
        _Fused.keep(ctx, x, low, layer, recipe, mask)
        return out.view(*layer.leading(x.shape), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:  # type: ignore[override]
        low, mask, x = _Fused.kept(ctx)
        layer = ctx.layer
        A, B = layer.factors()
        W, wide, t, o, r = layer.base_layer.weight, layer.wide, layer.ranks, grad.shape[-1], len(A)
        dy, ops = grad.reshape(-1, o), layer.device.lora_ops
        u, dB = ops.up_gradients(dy, B, low)
        buffer = dy.new_empty(len(dy), o + layer.border)
        buffer[:, :o].copy_(dy)
        _fill_border(buffer[:, o:], u * ctx.scale)
        U = dy.new_empty(t * len(dy), r)
        dx = torch.empty_like(x) if layer.needs_input_grad(ctx) else None

        def consume(rows: slice, gathered: Tensor) -> None:
            block(U, t, rows).copy_(gathered[..., o : o + r])
            if dx is None:
                return
            into = block(dx, t, rows)
            if wide is not None:
                multiply(gathered, wide, into)
                return
            multiply(gathered[..., o : o + r], A, into)
            if mask is not None:
                into.masked_fill_(_rows_of(mask, t, rows).dropped().view(into.shape), 0)  # type: ignore[union-attr]
            multiply(gathered[..., :o], W, into, onto=1.0)

        done = None
        if wide is not None and dx is not None:
            done = layer.device.gather_matmul(buffer, wide.t(), layer.tp_group)
        if done is not None:
            dx = done[0]
            U.copy_(done[1][:, o : o + r])
        else:
            overlap.gather(buffer, layer.tp_group, layer.chunks(len(dy)), consume)
        return _Fused.finish(ctx, dx, ops.down_gradient(U, x, mask), dB)  # U holds s U


def _fill_border(border: Tensor, low: Tensor) -> None:
    """border [n, at least r]: low [n, r], then zeros."""
    border[:, : low.shape[1]].copy_(low)
    border[:, low.shape[1] :].zero_()


def _rows_of(mask: Mask | None, ranks: int, rows: slice) -> Mask | None:
    """The mask of a chunk: the same `rows` of every rank's part."""
    if mask is None:
        return None
    return Mask(mask.rows.view(ranks, -1)[:, rows].reshape(-1), mask.columns, mask.p)


def _rows_of_rank(mask: Mask | None, ranks: int, rank: int) -> Mask | None:
    return None if mask is None else Mask(mask.rows.view(ranks, -1)[rank], mask.columns, mask.p)
