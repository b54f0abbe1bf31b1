"""Versions that do not belong together are told."""

from __future__ import annotations

import importlib.metadata

import pytest

from modellink_lora.device.facts import documented_cann, fits_torch_npu
from modellink_lora.diagnosis import versions


def test_torch_npu_belongs_to_the_torch_of_its_own_number() -> None:
    assert fits_torch_npu("2.7.1.post4", "2.7.1+cpu")
    assert fits_torch_npu("2.13.0", "2.13.0+cpu")
    assert not fits_torch_npu("2.7.1", "2.13.0+cpu")
    assert not fits_torch_npu("2.7.1.post4", "2.7.0")


@pytest.mark.parametrize(
    ("torch_npu", "torch", "cann", "levels"),
    [
        ("2.9.0", "2.9.0", "8.5.0", ["ok"]),
        ("2.9.0", "2.9.0", "9.0.0", ["warning"]),
        ("2.13.0", "2.13.0", "9.1.0", ["warning"]),  # no pair of it is known
        ("2.9.0", "2.10.0", "8.5.0", ["problem", "ok"]),
    ],
)
def test_pairs_of_torch_npu(torch_npu: str, torch: str, cann: str, levels: list[str]) -> None:
    found = {"torch": torch, "torch_npu": torch_npu, "CANN, and HCCL in it": cann}
    assert [f.level for f in versions.pairing_findings(found)] == levels


def test_the_documented_pair_is_by_release() -> None:
    assert documented_cann("2.7.1.post4") == "9.0.0"
    assert documented_cann("2.7.1.post99") is None


def test_a_library_outside_the_range_of_this_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["megatron-core<0.18,>=0.16.1", "torch>=99", "peft>=99; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    levels = {f.what: f.level for f in versions.version_findings("cpu")}
    assert (levels["megatron-core"], levels["torch"], levels["peft"]) == ("ok", "problem", "ok")
