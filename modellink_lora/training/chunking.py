"""Into how many chunks a fused linear cuts its tokens: measured once at the start, decided by arithmetic after that.

The measurement is of this run's own linears at its longest samples. All ranks of a tensor-parallel group work with the
slowest one's numbers, so they always decide alike.

Letters: n local tokens, T tokens of the whole group, t tensor parallel size, w width of what is sent.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext

CHOICES = (1, 2, 4)
WORTH = 0.97  # chunks make more and smaller operators: a gain below 3 % is not taken
_REPEATS = 7


@dataclass(frozen=True)
class Chunking:
    """Times of one linear, in seconds, at the `rows` local tokens they were measured for."""

    rows: int
    products: Mapping[int, float]  # by number of chunks: all products of one pass
    latency: float  # of a collective
    sending: float  # of all bytes of one pass, without latency

    def seconds(self, rows: int, chunks: int) -> float:
        """One pass: the first chunk is sent alone, the last one multiplied alone, in between both go on at once."""
        share = rows / self.rows / chunks
        send, product = self.latency + self.sending * share, self.products[chunks] * share
        return send + (chunks - 1) * max(send, product) + product

    def __call__(self, rows: int) -> int:
        """The fastest number of chunks for that many local tokens."""
        best = min((c for c in CHOICES if c <= rows), key=lambda c: self.seconds(rows, c), default=1)
        return best if self.seconds(rows, best) < WORTH * self.seconds(rows, 1) else 1


def chunks_of(wanted: str, deterministic: bool) -> str:
    """`auto` may choose otherwise in another run, and sums of other chunks round otherwise: not if asked for bits."""
    return "1" if wanted == "auto" and deterministic else wanted


class Measured:
    """base linear -> its Chunking; linears of one shape are measured once.

    Args:
        rows: local tokens [n] of the longest micro-batch; all tokens where there is no sequence parallelism.
    """

    def __init__(self, context: ParallelContext, device: Device, rows: int) -> None:
        self._context, self._device, self._rows = context, device, rows
        # the cache is this object's, not the class's: process groups must not outlive their run
        self._measured = functools.cache(self._measure)

    def __call__(self, base: Any) -> Callable[[int], int]:
        out, inputs = base.weight.shape
        is_column = hasattr(base, "output_size_per_partition")
        return self._measured(out, inputs, inputs if is_column else out, base.weight.dtype)

    def _measure(self, out: int, inputs: int, width: int, dtype: torch.dtype) -> Callable[[int], int]:
        context, n = self._context, self._rows
        if context.tp_size == 1:
            return lambda rows: 1
        t = context.tp_size if context.sequence_parallel else 1
        weight = torch.randn(out, inputs, device=context.device).to(dtype)
        products = {}
        for chunks in CHOICES:
            x = torch.randn(t, max(1, n // chunks), inputs, device=context.device).to(dtype).flatten(0, 1)
            products[chunks] = chunks * self._seconds(lambda x=x: x @ weight.t())  # type: ignore[misc]
        tiny, whole = self._sending(1, width, dtype), self._sending(n, width, dtype)
        numbers = torch.tensor([*products.values(), tiny, max(whole - tiny, 0.0)], device=context.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=context.tp_group)
        *times, latency, sending = numbers.tolist()
        return functools.cache(Chunking(n, dict(zip(CHOICES, times, strict=True)), latency, sending))

    def _sending(self, n: int, width: int, dtype: torch.dtype) -> float:
        context = self._context
        part = torch.zeros(n, width, device=context.device, dtype=dtype)
        if not context.sequence_parallel:
            return self._seconds(lambda: dist.all_reduce(part, group=context.tp_group))
        whole = part.new_empty(n * context.tp_size, width)
        return self._seconds(lambda: dist.all_gather_into_tensor(whole, part, group=context.tp_group))

    def _seconds(self, job: Callable[[], Any]) -> float:
        times = []
        for repeat in range(_REPEATS + 1):
            dist.barrier(group=self._context.tp_group)
            self._device.synchronize()
            begin = time.perf_counter()
            job()
            self._device.synchronize()
            if repeat:  # the first warms up
                times.append(time.perf_counter() - begin)
        return statistics.median(times)
