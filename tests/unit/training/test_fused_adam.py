"""State of the AdamW that Transformer Engine and apex bring, which counts steps for each group: on its double."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.training.optimizer import load_state_tensors, state_tensors
from tests.helpers.spawn import DOUBLE

SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.02}


def fused_adam() -> Callable[..., torch.optim.Optimizer]:
    """The double's, without making a package of its name importable here."""
    path = Path(DOUBLE) / "transformer_engine/pytorch/optimizers.py"
    spec = importlib.util.spec_from_file_location("double_of_fused_adam", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FusedAdam


def steps(adam: Any, parameter: torch.nn.Parameter, numbers: range) -> None:
    for number in numbers:
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * (number + 1) ** 0.5
        adam.step()


def chained(adam: Any) -> Any:
    return types.SimpleNamespace(chained_optimizers=[types.SimpleNamespace(optimizer=adam)])


@pytest.mark.parametrize("before", ["FusedAdam", "AdamW"])
@pytest.mark.parametrize("after", ["FusedAdam", "AdamW"])
def test_updates_go_on_as_if_nothing_had_happened(before: str, after: str) -> None:
    kinds = {"FusedAdam": fused_adam(), "AdamW": torch.optim.AdamW}
    start = torch.arange(6.0).view(2, 3)
    whole, half, rest = (torch.nn.Parameter(start.clone()) for _ in range(3))
    steps(kinds[after]([whole], **SETTINGS), whole, range(6))
    first = kinds[before]([half], **SETTINGS)
    steps(first, half, range(3))
    kept = {kind: tensor for _, kind, tensor in state_tensors(chained(first), {"a": half})}
    second = kinds[after]([rest], **SETTINGS)
    load_state_tensors(chained(second), {"a": rest}, lambda name, kind: kept[kind], steps=3)
    steps(second, rest, range(3, 6))
    if before == after:
        assert torch.equal(rest, whole)
    else:  # the two order their multiplications differently
        torch.testing.assert_close(rest, whole)
    assert set(second.state[rest]) == {"exp_avg", "exp_avg_sq"} | ({"step"} if after == "AdamW" else set())
