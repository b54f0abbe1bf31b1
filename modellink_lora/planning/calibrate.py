"""Measures what this machine reaches: matrix products, attention, element-wise passes, operators, collectives.

All processes measure at once, as in training, so that what they share (memory bandwidth, a socket) counts.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from modellink_lora.config.errors import UserError
from modellink_lora.device import Device, get_device
from modellink_lora.parallel.context import start_processes
from modellink_lora.planning.cost import Link, Machine

_REPEATS = 20
Seconds = Callable[..., float]
_NONE = Link(0.0, float("inf"))  # of a single process


def calibrate(device: str, dtype: str, processes: int, *, threads: int) -> tuple[Machine, dict[str, Any]]:
    """Rates of `processes` processes at work on this machine, and what was measured on.

    Args:
        threads: of each process, on a CPU.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        workers = [
            context.Process(target=_work, args=(rank, processes, folder, device, dtype, threads, sender))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            raise UserError("--calibrate: the measuring processes ended early; see what they said above") from None
        finally:
            for worker in workers:
                worker.join(timeout=30)
                worker.kill()
    return result


def _work(rank: int, processes: int, folder: str, name: str, dtype: str, threads: int, sender: Any) -> None:
    # about optional GPU libraries and coming renames; neither changes a rate
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    from modellink_lora.models.build import DTYPES  # imports megatron-core

    torch.set_num_threads(threads)
    device = get_device(name)
    here = device.activate(rank)
    start_processes(
        device.backend, rank=rank, world_size=processes, init_method=f"file://{Path(folder) / 'rendezvous'}",
        timeout_minutes=5,
    )  # fmt: skip
    machine = _measure(device, here, DTYPES[dtype], processes)
    facts = {"device": device.describe(), "dtype": dtype, "processes": processes, "threads": threads}
    if rank == 0:
        sender.send((machine, facts))
    dist.barrier()
    dist.destroy_process_group()


def _measure(device: Device, here: torch.device, dtype: torch.dtype, processes: int) -> Machine:
    accelerator = here.type != "cpu"
    size = 4096 if accelerator else 512  # milliseconds, so that on a busy machine some repeats go undisturbed

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=here).to(dtype)

    def seconds(job: Callable[[], Any], of: Callable[[list[float]], float] = min) -> float:
        """Best of the repeats, of the slowest process: others on the machine only ever make it slower."""
        times = []
        for repeat in range(_REPEATS + 2):
            dist.barrier()
            device.synchronize()
            begin = time.perf_counter()
            job()
            device.synchronize()
            if repeat >= 2:  # after the first, caches and kernels are warm
                times.append(time.perf_counter() - begin)
        worst = torch.tensor([of(times)], dtype=torch.float64 if not accelerator else torch.float32)
        worst = worst.to(here)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return float(worst)

    matmul, weights = _products(size, tensor, seconds)
    long, heads, width = 4096 if accelerator else 512, 8, 64
    q, k, v = (tensor(1, heads, long, width) for _ in range(3))
    attention = seconds(lambda: device.attention(q, k, v, causal=True, scale=width**-0.5))
    left, right = (tensor(2**27 if accelerator else 2**22) for _ in range(2))
    stream = 3 * left.numel() * left.element_size() / seconds(lambda: left * right)
    operator = _operator_seconds(here, seconds)
    inside, scatter = _NONE, None
    if processes > 1:
        inside, scatter = _links(here, dtype, processes, seconds, large=2**26 if accelerator else 2**20)
    return Machine(
        name=device.name, memory=0.0, matmul=matmul, weights=weights, stream=stream, operator=operator,
        attention=2 * heads * long**2 * width / attention, queued=accelerator, per_host=processes, inside=inside,
        between=inside, scatter=scatter,
    )  # fmt: skip


def _products(
    size: int, tensor: Callable[..., torch.Tensor], seconds: Seconds
) -> tuple[float, float]:  # fmt: skip
    """FLOP/s of many rows through a weight, forward and backward, and bytes/s of weights that few rows cost besides."""
    weight = tensor(4 * size, 2 * size)
    times = {}
    for rows in (size // 4, size):
        x, grad = tensor(rows, 2 * size), tensor(rows, 4 * size)
        times[rows] = (seconds(lambda x=x: F.linear(x, weight)) + seconds(lambda g=grad: g @ weight)) / 2  # type: ignore[misc]
    (few, little), (many, much) = times.items()
    one = (much - little) / (many - few)  # seconds a row
    rest = max(little - few * one, 0.0)
    rate = 2 * weight.numel() / one
    return rate, weight.numel() * weight.element_size() / rest if rest else math.inf


def _operator_seconds(here: torch.device, seconds: Seconds) -> float:
    """Time of a small operator, in the forward and backward of a chain in which every second one is a view."""
    rounds = 100
    start = torch.ones(16, 16, device=here, requires_grad=True)

    def chain() -> None:
        x = start
        for _ in range(rounds):
            x = (x * 1.5).view(256).view(16, 16)
            x = x + start
        x.sum().backward()

    return seconds(chain) / (rounds * 9)  # dispatched: 4 forward; 5 backward, with the sum of start's gradients


def _links(
    here: torch.device, dtype: torch.dtype, processes: int, seconds: Seconds, *, large: int
) -> tuple[Link, Link]:
    """Latency and bandwidth of all-reduces and gathers together, and those of reduce-scatter."""

    side = 2048 if here.type != "cpu" else 256
    x = torch.randn(side, side, device=here).to(dtype)

    def between(job: Callable[[], Any] | None) -> float:
        """As in a layer, where a collective also waits for the process that computes longest: median, not best."""
        return seconds(lambda: (x @ x, job() if job else None), statistics.median)

    alone = between(None)

    def link(job: Callable[[torch.Tensor, torch.Tensor], Any], rounds: int) -> Link:
        times = {}
        for elements in (processes, large):
            whole = torch.zeros(elements, device=here, dtype=dtype)
            part = torch.zeros(elements // processes, device=here, dtype=dtype)
            times[elements] = between(lambda whole=whole, part=part: job(whole, part))  # type: ignore[misc]
        moved = rounds * large * torch.empty(0, dtype=dtype).element_size() * (processes - 1) / processes
        latency = max(times[processes] - alone, 1e-6) / rounds / math.log2(processes)
        return Link(latency, moved / max(times[large] - times[processes], 1e-9))

    reduce = link(lambda whole, part: dist.all_reduce(whole), 2)
    gather = link(lambda whole, part: dist.all_gather_into_tensor(whole, part), 1)
    scatter = link(lambda whole, part: dist.reduce_scatter_tensor(part, whole), 1)
    both = Link((reduce.latency + gather.latency) / 2, 2 / (1 / reduce.bandwidth + 1 / gather.bandwidth))
    return both, scatter
