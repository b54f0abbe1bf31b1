"""Collectives of a tensor-parallel linear in chunks of tokens: one is under way while another is multiplied.

A frozen weight needs no gradient of its own, so there is no other work to hide these collectives behind. Only plain
asynchronous collectives are used, so gloo, NCCL and HCCL all serve.

Letters: n tokens of one rank, m tokens of one chunk, t tensor parallel size, w width, k and o inputs and outputs of a
product. A gathered chunk holds m tokens of each rank, [t, m, w]; `block(whole, t, rows)` is where they belong, so every
token lands in its own row whatever the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def chunk_rows(n: int, chunks: int) -> list[slice]:
    """Up to `chunks` runs of equal length that cover n rows; the last may be shorter."""
    step = -(-n // max(1, min(chunks, n)))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def block(whole: Tensor, ranks: int, rows: slice) -> Tensor:
    """View [t, m, w] of [t n, w]: the same `rows` of every rank's part. `whole` may be cut out of wider rows."""
    return whole.unflatten(0, (ranks, -1))[:, rows]


def multiply(x: Tensor, weight: Tensor, out: Tensor, *, onto: float = 0.0) -> None:
    """out = x @ weight + onto * out, for x [t, m, k], weight [k, o], out [t, m, o], any of them strided."""
    if _is_flat(x) and _is_flat(out):  # one matrix
        flat_x, flat_out = x.flatten(0, 1), out.flatten(0, 1)
        if onto:
            torch.addmm(flat_out, flat_x, weight, beta=onto, out=flat_out)
        else:
            torch.mm(flat_x, weight, out=flat_out)
    elif onto:
        torch.baddbmm(out, x, weight.expand(len(x), -1, -1), beta=onto, out=out)
    else:
        torch.bmm(x, weight.expand(len(x), -1, -1), out=out)


def _is_flat(x: Tensor) -> bool:
    return len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def gather(part: Tensor, group: dist.ProcessGroup, chunks: int, consume: Callable[[slice, Tensor], None]) -> None:
    """All-gather the rows of `part` [n, w]; `consume(rows, gathered)` takes each chunk [t, m, w] as it comes."""
    if group.size() == 1:
        consume(slice(0, len(part)), part[None])
        return
    part, spans = part.contiguous(), chunk_rows(len(part), chunks)

    def start(rows: slice) -> tuple[Tensor, Any]:
        gathered = part.new_empty(group.size(), rows.stop - rows.start, part.shape[1])
        work = dist.all_gather_into_tensor(gathered.flatten(0, 1), part[rows], group=group, async_op=True)
        return gathered, work

    under_way = start(spans[0])
    for number, rows in enumerate(spans):
        gathered, work = under_way
        if number + 1 < len(spans):
            under_way = start(spans[number + 1])
        work.wait()
        consume(rows, gathered)


def scatter(
    like: Tensor, shape: tuple[int, int], group: dist.ProcessGroup, chunks: int,
    produce: Callable[[slice, Tensor], None],
) -> Tensor:  # fmt: skip
    """Sum over ranks, of which each keeps its own rows: [n, w].

    Args:
        like: a tensor of the result's dtype and device.
        shape: n, w.
        produce: fills `partial` [t, m, w] of the chunk `rows`, in `produce(rows, partial)`.
    """
    n, w = shape
    out, under_way = like.new_empty(n, w), []
    if group.size() == 1:
        produce(slice(0, n), out[None])
        return out
    for rows in chunk_rows(n, chunks):
        partial = like.new_empty(group.size(), rows.stop - rows.start, w)
        produce(rows, partial)
        work = dist.reduce_scatter_tensor(out[rows], partial.flatten(0, 1), group=group, async_op=True)
        under_way.append((work, partial))  # the buffer must live until it is sent
    for work, _ in under_way:
        work.wait()
    return out


def reduce(
    like: Tensor, shape: tuple[int, int], group: dist.ProcessGroup, chunks: int,
    produce: Callable[[slice, Tensor], None],
) -> Tensor:  # fmt: skip
    """As `scatter`, but every rank holds all rows before and after: `produce` fills [1, m, w]."""
    n, w = shape
    out, under_way = like.new_empty(n, w), []
    alone = group.size() == 1
    for rows in chunk_rows(n, 1 if alone else chunks):
        produce(rows, out[None, rows])
        if not alone:
            under_way.append(dist.all_reduce(out[rows], group=group, async_op=True))
    for work in under_way:
        work.wait()
    return out
