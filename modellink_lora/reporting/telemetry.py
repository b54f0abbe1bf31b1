"""Where the time of a step goes, and how fast a run is: sampled time split, tokens/s, FLOP/s and its share of the peak.

A measured step is slower than an ordinary one: the device is waited for at every change of part, and collectives do not
overlap with computation. So only a few steps are measured; all rates come from the wall clock of all steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.reporting.time_split import (
    DATA_PARALLEL,
    PARTS,
    PIPELINE,
    TENSOR,
    ScheduleTimers,
    StepClock,
    Window,
)  # fmt: skip

MEASURE_EVERY = 10  # a run that logs every step must not become a run of measured steps


class CollectiveTimer(TorchDispatchMode):
    """Charges every collective that runs inside it, wherever it is called, to the kind of its process group.

    torch.distributed's collectives pass through PyTorch's dispatcher as operators of the namespace c10d on every
    backend, also in backward. Each is waited for at once, so its time holds the waiting for slower processes. Point to
    point messages are left alone: waiting for one before its partner is posted would never end.
    """

    def __init__(self, clock: StepClock, kinds: Mapping[Any, str]) -> None:
        super().__init__()
        self._clock, self._kinds = clock, kinds  # group name -> part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "c10d" or func._opname in ("send", "recv_", "recv_any_source_"):
            return func(*args, **kwargs)
        # in every operator of c10d the first argument that is not tensors is the group
        boxed = next(argument for argument in (*args, *kwargs.values()) if isinstance(argument, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1:  # megatron-core sums losses over a tensor group of one, too
            return func(*args, **kwargs)
        self._clock.enter(self._kinds.get(group.group_name, DATA_PARALLEL))
        answer = func(*args, **kwargs)
        work = answer[-1] if isinstance(answer, tuple | list) else answer
        if hasattr(work, "wait"):
            work.wait()
        self._clock.leave()
        return answer


class Telemetry:
    """Clock and counters of a run; every process has one, and all call the same methods.

    Args:
        model_config: megatron-core's configuration of the model; `timers` is set on it during a measured step.
        flops: arithmetic of samples of these lengths, see `flops.lora_step_flops`.
        dtype: of the matrix multiplications, for the peak of the device.
    """

    def __init__(
        self, device: Device, context: ParallelContext, *, model_config: Any,
        flops: Callable[[list[int]], float], dtype: torch.dtype, log_interval: int,
    ) -> None:  # fmt: skip
        self._device, self._context, self._config, self._flops = device, context, model_config, flops
        self._log_interval = log_interval
        self._peak = device.peak_flops(dtype)
        self._clock: StepClock | None = None
        self._measured: dict[str, float] | None = None
        self._steps_done, self._last_measured = 0, -MEASURE_EVERY
        self._kinds = {context.tp_group.group_name: TENSOR, context.pp_group.group_name: PIPELINE}
        self._begin_window()

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """One step. It is measured when it ends a log interval, is not the process's first, and the last one is far."""
        self._steps += 1
        due = iteration % self._log_interval == 0 and self._steps_done > 0
        self._steps_done += 1
        if not due or iteration - self._last_measured < MEASURE_EVERY:
            yield
            return
        self._last_measured = iteration
        if self._context.world_size > 1:
            dist.barrier()  # else the first collective would be charged with what others still had to do before
        self._clock = clock = StepClock(self._device.synchronize)
        self._config.timers = ScheduleTimers(clock, pipeline=self._context.pp_size > 1)
        collectives = CollectiveTimer(clock, self._kinds) if self._context.world_size > 1 else contextlib.nullcontext()
        try:
            with collectives:
                yield
            self._measured = clock.finish()
        finally:
            self._clock = self._config.timers = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A stretch of a step that megatron-core does not announce: "data", "optimizer"."""
        if self._clock is None:
            yield
            return
        self._clock.enter(name)
        yield
        self._clock.leave()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work between steps that no rate should count: validation, saving."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def count(self, *, lengths: list[int], trained_tokens: int) -> None:
        """Add a finished step: the true lengths of this replica's samples, and the trained tokens of all replicas."""
        self._tokens += sum(lengths)
        self._work += self._flops(lengths)
        self._trained += trained_tokens

    def window(self) -> Window:
        """What the steps since the last call took; begins the next window. All processes call it together."""
        self._device.synchronize()
        seconds = time.perf_counter() - self._begin - self._paused
        mine = torch.tensor([self._tokens, self._work], dtype=self._device.widest_float, device=self._context.device)
        dist.all_reduce(mine, group=self._context.dp_group)
        tokens, work = mine.tolist()
        window = Window(
            steps=self._steps, seconds=seconds, tokens=tokens, trained_tokens=self._trained, flops=work,
            devices=self._context.world_size, peak_flops=self._peak, ranks=self._gather(),
        )  # fmt: skip
        self._begin_window()
        return window

    def _begin_window(self) -> None:
        self._steps, self._tokens, self._trained, self._work, self._paused = 0, 0, 0, 0.0, 0.0
        self._measured = None
        self._begin = time.perf_counter()

    def _gather(self) -> list[dict[str, float]] | None:
        """Every rank's split and memory, if this step was measured: the same answer everywhere."""
        if self._measured is None:
            return None
        mine = [*self._measured.values(), self._device.memory()["max allocated"]]
        shape = (self._context.world_size, len(mine))
        table = torch.zeros(shape, dtype=self._device.widest_float, device=self._context.device)
        table[self._context.rank] = torch.tensor(mine, dtype=self._device.widest_float)
        dist.all_reduce(table)  # one row is not zero on each rank: a gather that every backend has
        return [dict(zip((*PARTS, "memory"), row, strict=True)) for row in table.tolist()]
