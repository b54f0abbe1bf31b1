"""The learning rate over a run, and AdamW's state as plain tensors by parameter name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modellink_lora.config.train import TrainConfig
from modellink_lora.training.optimizer import load_state_tensors, make_scheduler, state_tensors

BATCH = 4


def rates(steps: int, **changes: Any) -> list[float]:
    """The learning rate each of `steps` updates is taken with."""
    config = TrainConfig(**{"train_iters": 10, "lr": 1e-3, "min_lr": 1e-4, **changes})
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = make_scheduler(config, optimizer, BATCH)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(BATCH)
    return found


def test_warm_up_is_linear_and_cosine_falls_to_the_lowest_rate() -> None:
    found = rates(13, lr_decay_style="cosine", lr_warmup_iters=2)
    decay = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert found == pytest.approx([0.0, 5e-4, *decay, 1e-4, 1e-4])


def test_the_styles_differ_after_the_warm_up_only() -> None:
    assert rates(11, lr_decay_style="linear") == pytest.approx([1e-3 - 9e-5 * step for step in range(11)])
    assert rates(11, lr_decay_style="constant") == pytest.approx([1e-3] * 11)
    found = rates(11, lr_decay_style="inverse-square-root", lr_warmup_iters=2)
    assert found[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert found[8] == pytest.approx(1e-3 * math.sqrt(2 / 8))


def test_a_fraction_warms_up_that_part_of_the_decay() -> None:
    fraction = rates(8, lr_decay_style="cosine", lr_warmup_fraction=0.2)
    assert fraction == rates(8, lr_decay_style="cosine", lr_warmup_iters=2)
    assert rates(3, lr_decay_style="linear", lr_decay_iters=2)[2] == pytest.approx(1e-4), "--lr-decay-iters ends it"


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 2, generator=generator).to(dtype) for name in ("x.lora_A", "x.lora_B")}


def adamw(held: dict[str, Tensor]) -> tuple[Any, torch.optim.AdamW]:
    """What megatron-core makes: one AdamW in a chain, over fp32 masters of low-precision parameters."""
    mains = []
    for parameter in held.values():
        if parameter.dtype != torch.float32:
            parameter.main_param = parameter.float().clone()  # type: ignore[attr-defined]
        mains.append(getattr(parameter, "main_param", parameter))
    inner = torch.optim.AdamW(mains, lr=1e-2, weight_decay=0.1)
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), inner


def update(held: dict[str, Tensor], inner: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        for number, parameter in enumerate(held.values()):
            main = getattr(parameter, "main_param", parameter)
            main.grad = torch.full_like(main, 0.1 * (number + 1) + step)
        inner.step()
        for parameter in held.values():
            parameter.copy_(getattr(parameter, "main_param", parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_taken_out_and_put_back_continues_bit_by_bit(dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    optimizer, inner = adamw(whole)
    update(whole, inner, 3)
    saved = {f"{name}.{kind}": tensor.clone() for name, kind, tensor in state_tensors(optimizer, whole)}
    assert saved.keys() == {f"x.lora_{f}.{k}" for f in "AB" for k in ("master", "exp_avg", "exp_avg_sq")}
    assert all(tensor.dtype == torch.float32 and tensor.shape == (3, 2) for tensor in saved.values())
    update(whole, inner, 2)

    parts = {name: torch.zeros_like(tensor) for name, tensor in parameters(dtype).items()}
    optimizer, inner = adamw(parts)
    load_state_tensors(optimizer, parts, lambda name, kind: saved[f"{name}.{kind}"], steps=3)
    update(parts, inner, 2)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_number_of_updates_matters_for_what_follows() -> None:
    held = parameters(torch.float32)
    optimizer, inner = adamw(held)
    update(held, inner, 3)
    saved = {(name, kind): tensor.clone() for name, kind, tensor in state_tensors(optimizer, held)}
    results = []
    for steps in (3, 0):
        other = parameters(torch.float32)
        optimizer, inner = adamw(other)
        load_state_tensors(optimizer, other, lambda name, kind: saved[name, kind], steps=steps)
        update(other, inner, 1)
        results.append(other["x.lora_A"])
    assert not torch.equal(*results), "a test that would pass with any count proves nothing"


def test_moments_are_zero_before_the_first_step() -> None:
    held = parameters(torch.float32)
    optimizer, _ = adamw(held)
    found = {(name, kind): tensor for name, kind, tensor in state_tensors(optimizer, held)}
    assert torch.equal(found["x.lora_A", "master"], held["x.lora_A"])
    assert not found["x.lora_B", "exp_avg"].any() and not found["x.lora_B", "exp_avg_sq"].any()
