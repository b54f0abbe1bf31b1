"""Records what a program computes, sends and waits for, in order: on real processes, or at any size without data.

The program itself runs, megatron-core's linear or this project's; nothing is described by hand. Without data ("fake"
tensors and a process group whose other ranks do not exist) an operator's cost follows from its operations and bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.counters import Collective, Watching, name_of, nbytes, tensors


@dataclass(frozen=True)
class Operation:
    """One kernel: floating-point operations of a matrix product, bytes it reads and writes, seconds if it was timed."""

    name: str
    flops: int
    traffic: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Launch:
    """A collective is handed to the link."""

    number: int
    collective: Collective


@dataclass(frozen=True)
class Wait:
    """The computation goes on when collective `number` is done."""

    number: int


Event = Operation | Launch | Wait
# operator: position of the left factor among its arguments
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
WRITES_ONLY = frozenset({"copy_", "zero_", "fill_"})  # their first argument is not read


class Recorder(Watching):
    """`events` of what runs while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._works: dict[int, tuple[Any, int]] = {}  # id of a Work: itself, kept so that the id stays its own; number
        self._number = 0

    def kernel(self, function: Any, args: Any, kwargs: Any, result: Any, seconds: float) -> None:
        name = name_of(function)
        traffic = traffic_of(name, args, kwargs, result)
        self.events.append(Operation(name, flops_of(name, args, result), traffic, seconds))

    def launched(self, collective: Collective, work: Any, begin: float) -> None:
        self._number += 1
        self.events.append(Launch(self._number, collective))
        self._works[id(work)] = work, self._number

    def waited(self, work: Any) -> None:
        if id(work) in self._works:
            self.events.append(Wait(self._works[id(work)][1]))


def flops_of(name: str, args: Any, result: Tensor) -> int:
    """2 m n k of a matrix product; other kernels are bound by their bytes."""
    if name not in PRODUCTS:
        return 0
    return 2 * result.numel() * args[PRODUCTS[name]].shape[-1]


def traffic_of(name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written if every tensor crosses the memory bus once."""
    reads = list(tensors(args))
    if name in WRITES_ONLY or kwargs.get("beta") == 0:
        reads = reads[1:]
    return nbytes(reads) + nbytes(result)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Tensors made here have shapes and no elements: a 70B layer fits, and takes milliseconds."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # the hash of dropout masks leaves PyTorch on a CPU, where there would be elements; of its shape and dtype instead:
    users = ("modellink_lora.device.lora_ops", "modellink_lora.models.dropout")
    with contextlib.ExitStack() as stack:
        for module in users:
            stack.enter_context(patch(f"{module}.dropped", lambda rows, columns, p: (rows ^ columns) < p))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def record(program: Callable[[], object]) -> list[Event]:
    with Recorder() as recorder:
        program()
    return recorder.events


def as_16_bit(events: Iterable[Event]) -> Iterator[Event]:
    """The same program on elements of half the size, of one that was recorded in fp32.

    A CPU computes r-wide products of bf16 tensors in fp32 copies, block by block; an accelerator does what a CPU does
    in fp32.
    """
    for event in events:
        if isinstance(event, Operation):
            yield replace(event, traffic=event.traffic // 2)
        elif isinstance(event, Launch):
            yield replace(event, collective=replace(event.collective, payload=event.collective.payload // 2))
        else:
            yield event
