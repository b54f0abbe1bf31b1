"""Records what a program computes, sends and waits for, in order: on real processes, or at any size without data.

The program itself runs, megatron-core's linear or this project's; nothing is described by hand. Without data ("fake"
tensors and a process group whose other ranks do not exist) an operator's cost follows from its operations and bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, Work
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counters import Collective, collective_of, is_collective, is_kernel, name_of, nbytes, tensors


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


class Recorder(TorchDispatchMode):
    """`events` of what runs while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._works: dict[int, tuple[Any, int]] = {}  # id of a Work: itself, kept so that the id stays its own; number
        self._number = 0
        # the handle of a group that does not exist has a `wait` of its own
        self._patches = [patch.object(kind, "wait", _noting(self, kind.wait)) for kind in (Work, FakeWork)]

    def __enter__(self) -> Recorder:
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for one in self._patches:
            one.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        seconds = time.perf_counter() - begin
        if is_collective(function):
            self._number += 1
            self.events.append(Launch(self._number, collective_of(function, args, result)))
            work = work_of(result)
            if work is not None:
                self._works[id(work)] = work, self._number
        elif is_kernel(function):
            self.events.append(Operation(
                name_of(function), flops_of(name_of(function), args, result),
                traffic_of(name_of(function), args, kwargs or {}, result), seconds,
            ))  # fmt: skip
        return result

    def waited(self, work: Any) -> None:
        if id(work) in self._works:
            self.events.append(Wait(self._works[id(work)][1]))


def _noting(recorder: Recorder, original: Callable[..., bool]) -> Callable[..., bool]:
    def wait(work: Any, *args: Any) -> bool:
        recorder.waited(work)
        return original(work, *args)

    return wait


def work_of(result: Any) -> Any:
    """The handle among a collective's results, the very object that torch.distributed gives its caller."""
    for value in result if isinstance(result, tuple | list) else (result,):
        if isinstance(value, torch.ScriptObject):
            return Work.unbox(value)
    return None


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
