"""The clock of a step, what megatron-core's timer names mean, rates, and the peaks of chips."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from modellink_lora.device import get_device
from modellink_lora.device.peaks import cuda_peak, npu_peak
from modellink_lora.reporting.time_split import PARTS, ScheduleTimers, StepClock, Window


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 0.0
        self.synchronized: list[float] = []

    def clock(self) -> StepClock:
        return StepClock(lambda: self.synchronized.append(self.time), lambda: self.time)


def test_each_moment_belongs_to_the_innermost_part_and_the_parts_add_up_to_the_wall_time() -> None:
    hands = Hands()
    clock = hands.clock()
    for seconds, move in (
        (1, lambda: clock.enter("forward")), (2, lambda: clock.enter("tensor communication")), (4, clock.leave),
        (8, clock.leave), (16, lambda: clock.enter("optimizer")), (32, clock.leave), (64, clock.finish),
    ):  # fmt: skip
        hands.time += seconds
        move()
    expected = {"forward": 2 + 8, "tensor communication": 4, "optimizer": 32, "other": 1 + 16 + 64}
    assert clock.seconds == {part: expected.get(part, 0) for part in PARTS}
    assert sum(clock.seconds.values()) == hands.time


def test_the_device_is_waited_for_at_every_change_of_part() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.time = 1
    clock.enter("forward")
    hands.time = 2
    clock.leave()
    hands.time = 3
    clock.finish()
    assert hands.synchronized == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("forward-compute", "forward"), ("backward-compute", "backward"), ("forward-recv", "pipeline communication"),
        ("backward-send-forward-recv", "pipeline communication"), ("all-grads-sync", "other"),
        ("forward-backward", "pipeline communication"), ("optimizer-inner-step", "optimizer"),
    ],
)  # fmt: skip
def test_a_timer_of_megatron_core_is_charged_to_its_part(name: str, part: str) -> None:
    hands = Hands()
    clock = hands.clock()
    clock.enter("optimizer")  # what a timer without a part of its own is charged to
    timers = ScheduleTimers(clock, pipeline=True)
    timers(name, log_level=2).start(barrier=True)
    hands.time = 5
    timers(name).stop()
    clock.leave()
    assert clock.finish()[part] == 5


def test_between_the_computations_of_a_schedule_without_stages_nothing_is_communicated() -> None:
    hands = Hands()
    clock = hands.clock()
    timers = ScheduleTimers(clock, pipeline=False)
    timers("forward-backward").start()
    hands.time = 5
    timers("forward-backward").stop()
    assert clock.finish()["other"] == 5


def window(**changes: Any) -> Window:
    rank = {**dict.fromkeys(PARTS, 0.1), "memory": 1e9}
    values: dict[str, Any] = dict(
        steps=5, seconds=10.0, tokens=4000.0, trained_tokens=1000.0, flops=8e15, devices=4, peak_flops=1e15,
        ranks=[{**rank, "forward": 0.3}, {**rank, "forward": 0.5}],
    )  # fmt: skip
    return Window(**{**values, **changes})


def test_rates_are_those_of_the_whole_interval() -> None:
    metrics = window().metrics()
    assert metrics["step ms"] == 2000
    assert metrics["tokens/s"] == 400 and metrics["trained tokens/s"] == 100
    assert metrics["TFLOP/s/device"] == pytest.approx(200)
    assert metrics["MFU"] == pytest.approx(0.2)
    assert metrics["forward ms"] == pytest.approx(400), "mean over ranks"
    assert metrics["measured step ms"] == pytest.approx(400 + 100 * (len(PARTS) - 1))


def test_the_line_has_all_parts_and_rates_a_device() -> None:
    assert re.fullmatch(
        r" time split \(ms\) \| data: 100\.0 \| forward: 400\.0 \| backward: 100\.0 \| communication: 300\.0 \| "
        r"optimizer: 100\.0 \| other: 100\.0 \| tokens/s/device: 100\.0 \| trained tokens/s/device: 25\.0 \| "
        r"MFU: 20\.0% \|",
        window().line() or "",
    )


def test_what_was_not_measured_or_is_not_known_is_left_out() -> None:
    plain = window(ranks=None, peak_flops=None)
    assert plain.line() is None
    assert set(plain.metrics()) == {"step ms", "tokens/s", "trained tokens/s", "TFLOP/s/device"}
    assert "MFU" not in (window(peak_flops=None).line() or "")


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12), ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 66.9e12), ("NVIDIA H20", 148e12, 44e12), ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA RTX A4000", None, None), ("a chip of the future", None, None),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_found_by_whole_words(name: str, bf16: float | None, fp32: float | None) -> None:
    assert cuda_peak(name, torch.bfloat16) == cuda_peak(name, torch.float16) == pytest.approx(bf16)
    assert cuda_peak(name, torch.float32) == pytest.approx(fp32)


def test_the_peak_of_an_npu_is_found_and_an_unknown_one_is_none() -> None:
    assert npu_peak("Ascend910B3", torch.bfloat16) == 313e12
    assert npu_peak("Ascend910_9362", torch.float16) == 376e12
    assert npu_peak("Ascend910B3", torch.float32) is None and npu_peak("Ascend310P3", torch.float16) is None
    assert get_device("cpu").peak_flops(torch.float32) is None
