"""The operators of a device are checked against fp64, and a wrong one is a problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modellink_lora.device.cpu import CpuDevice
from modellink_lora.device.limits import report
from modellink_lora.diagnosis.operators import CHECKS, error_of, operator_findings

HERE = torch.device("cpu")


def levels(device: CpuDevice) -> dict[str, str]:
    return {f.what: f.level for f in operator_findings(device, HERE, None)}


@pytest.fixture(scope="module")
def sound() -> list[Any]:
    return operator_findings(CpuDevice(), HERE, None)


def test_the_operators_of_a_cpu_are_right_and_named(sound: list[Any]) -> None:
    assert {f.level for f in sound} == {"ok"}
    assert len(sound) == 2 * len(CHECKS)  # fp32 and bf16
    assert "flash_attention_for_cpu" in next(f.found for f in sound if f.what == "attention float32")


def test_a_wrong_value_is_a_problem() -> None:
    class Halves(CpuDevice):
        def swiglu(self, x: Tensor) -> Tensor:
            return super().swiglu(x.flip(-1))  # gate and up exchanged

    found = levels(Halves())
    assert {what for what, level in found.items() if level == "problem"} == {"swiglu float32", "swiglu bfloat16"}


def test_a_wrong_gradient_is_a_problem() -> None:
    class NoGradientOfKeys(CpuDevice):
        def attention(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
            return super().attention(q, k.detach() + 0 * k, v, **settings)

    found = levels(NoGradientOfKeys())
    assert {what for what, level in found.items() if level == "problem"} == {"attention float32", "attention bfloat16"}


def test_one_wrong_row_of_many_is_seen() -> None:
    expected = torch.randn(1000, 64)
    found = expected.clone()
    found[517] = 0
    assert error_of([found], [expected]) > 0.5
    found[517] = torch.nan
    assert error_of([found], [expected]) == float("inf")


def test_a_fallback_warns_and_says_why() -> None:
    class TooOld(CpuDevice):
        def swiglu(self, x: Tensor) -> Tensor:
            report("swiglu_of_this_test", (f"the chip knows no {x.dtype}",))
            return super().swiglu(x)

    found = [f for f in operator_findings(TooOld(), HERE, None) if f.what == "swiglu float32"]
    assert [f.level for f in found] == ["warning"]
    assert "the chip knows no torch.float32" in found[0].advice


def test_an_operator_that_fails_is_a_problem_with_its_first_line() -> None:
    class Fails(CpuDevice):
        def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
            raise RuntimeError("EZ9999: no such kernel\nmany more lines")

    found = [f for f in operator_findings(Fails(), HERE, None) if f.level == "problem"]
    assert len(found) == 4
    assert {f.found for f in found} == {"fails: EZ9999: no such kernel"}
