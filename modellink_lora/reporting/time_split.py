"""The parts of a step and the rates of a log interval, as plain numbers: the clock itself is given from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COMMUNICATION = ("tensor communication", "pipeline communication", "data communication")
TENSOR, PIPELINE, DATA_PARALLEL = COMMUNICATION
PARTS = ("data", "forward", "backward", *COMMUNICATION, "optimizer", "other")


class StepClock:
    """Splits one step into parts that add up to its wall time: each moment belongs to the innermost open part."""

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize, self._now = synchronize, now
        self._open = ["other"]
        self.seconds = dict.fromkeys(PARTS, 0.0)
        synchronize()
        self._since = now()

    def enter(self, part: str) -> None:
        assert part in self.seconds, part
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        assert len(self._open) > 1, "left a part that was not entered"
        self._charge()
        self._open.pop()

    def finish(self) -> dict[str, float]:
        """Seconds by part; their sum is the time since the clock was made."""
        self._charge()
        return self.seconds

    @property
    def part(self) -> str:
        return self._open[-1]

    def _charge(self) -> None:
        self._synchronize()
        now = self._now()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


class ScheduleTimers:
    """What megatron-core calls as `config.timers(name, log_level=...).start() / .stop()`, in terms of a StepClock."""

    def __init__(self, clock: StepClock, *, pipeline: bool) -> None:
        self._clock, self._pipeline = clock, pipeline

    def __call__(self, name: str, log_level: int | None = None) -> _ScheduleTimer:
        return _ScheduleTimer(self._clock, self._part(name))

    def _part(self, name: str) -> str:
        if name in ("forward-compute", "backward-compute"):
            return name.removesuffix("-compute")
        if "-send" in name or "-recv" in name:
            return PIPELINE
        if name == "forward-backward":  # between computations a schedule with stages does nothing but wait for messages
            return PIPELINE if self._pipeline else "other"
        if name.endswith(("grads-sync", "grads-all-reduce")):
            return "other"  # the collectives in it are charged by CollectiveTimer
        return self._clock.part


@dataclass(frozen=True)
class _ScheduleTimer:
    clock: StepClock
    part: str

    def start(self, barrier: bool = False) -> None:
        """Enter the part. No barrier: waiting for others is communication, and the split shows it as that."""
        self.clock.enter(self.part)

    def stop(self, barrier: bool = False) -> None:
        self.clock.leave()


@dataclass(frozen=True)
class Window:
    """The steps since the last log line, over all processes."""

    steps: int
    seconds: float
    tokens: float  # true lengths of all samples, padding not counted
    trained_tokens: float
    flops: float
    devices: int
    peak_flops: float | None  # of one device
    ranks: list[dict[str, float]] | None = None  # of the last step, if measured: seconds by part, and "memory" in bytes

    @property
    def milliseconds(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def tflops(self) -> float:
        """TFLOP/s of one device: the arithmetic LoRA needs for the true lengths, recomputation not counted."""
        return self.flops / self.seconds / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s utilisation, 0 to 1; None where the peak of the device is not known."""
        return None if self.peak_flops is None else self.flops / self.seconds / self.devices / self.peak_flops

    @property
    def split(self) -> dict[str, float] | None:
        """Milliseconds of the measured step by part, mean over ranks."""
        return mean_split(self.ranks) if self.ranks else None

    def metrics(self) -> dict[str, float]:
        """Scalars for metrics.jsonl and the trackers."""
        values = {
            "step ms": self.milliseconds,
            "tokens/s": self.tokens / self.seconds,
            "trained tokens/s": self.trained_tokens / self.seconds,
            "TFLOP/s/device": self.tflops,
        }
        if self.mfu is not None:
            values["MFU"] = self.mfu
        if self.split:
            values |= {f"{part} ms": value for part, value in self.split.items()}
            values["measured step ms"] = sum(self.split.values())
        return values

    def line(self) -> str | None:
        """The line below Megatron's log line when the last step was measured."""
        if not self.split:
            return None
        split = self.split
        shown = {part: split[part] for part in PARTS if part not in COMMUNICATION}
        shown = {**shown, "communication": sum(split[part] for part in COMMUNICATION)}
        order = ("data", "forward", "backward", "communication", "optimizer", "other")
        each = self.seconds * self.devices
        rates = {
            "tokens/s/device": f"{self.tokens / each:.1f}",
            "trained tokens/s/device": f"{self.trained_tokens / each:.1f}",
        }
        if self.mfu is not None:
            rates["MFU"] = f"{100 * self.mfu:.1f}%"
        fields = [f"{part}: {shown[part]:.1f}" for part in order] + [f"{name}: {rate}" for name, rate in rates.items()]
        return f" time split (ms) | {' | '.join(fields)} |"


def mean_split(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds by part, mean over `ranks`."""
    return {part: 1000 * sum(rank[part] for rank in ranks) / len(ranks) for part in PARTS}
