"""An interrupted run that is resumed equals the run that was not interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modellink_lora.config.errors import UserError
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    fine_tune_here,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

STEPS, STOP = 8, 4
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "data")
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def tune(base: Path, save: Path, parallel: dict[str, Any], lora: dict[str, Any] | None = None, **train: Any) -> None:
    run(
        fine_tune_here,
        world_size=2,
        train=train_flags(
            load=str(base), save=str(save), train_iters=STEPS, lr_decay_style="cosine", min_lr=1e-4,
            lr_warmup_iters=2, **train,
        ),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS} if lora is None else lora,
    )  # fmt: skip


def last(save: Path) -> Path:
    return save / f"iter_{STEPS:07d}"


@pytest.mark.parametrize(
    "parallel, extra",
    [(TP2_SP, {}), (PP2, {"bf16": True}), ({}, {"fp16": True, "initial_loss_scale": 2.0**10, "loss_scale_window": 3})],
    ids=["tp2-sp", "pp2-bf16", "dp2-fp16"],
)
def test_resume_at_the_same_layout_is_bit_exact(
    parallel: dict[str, Any], extra: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    dropout = {"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dropout": 0.1}  # so that random states matter
    tune(base, tmp_path / "whole", parallel, dropout, **extra)
    tune(base, tmp_path / "parts", parallel, dropout, exit_interval=STOP, **extra)
    assert (tmp_path / "parts/latest_checkpointed_iteration.txt").read_text() == str(STOP)
    tune(base, tmp_path / "parts", parallel, {"dropout": 0.1}, lora_load=str(tmp_path / "parts"), **extra)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("adapter", "optimizer", "rng"):
        whole, parts = (load_file(last(tmp_path / run_) / f"{name}.safetensors") for run_ in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        for key in whole:
            assert torch.equal(whole[key], parts[key]), (name, key)
    whole, parts = (json.loads((last(tmp_path / run_) / "training.json").read_text()) for run_ in ("whole", "parts"))
    assert whole == parts


def test_resume_at_another_layout_continues_to_rounding(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "whole", TP2_SP)
    tune(base, tmp_path / "parts", TP2_SP, exit_interval=STOP)
    tune(base, tmp_path / "parts", PP2, {}, lora_load=str(tmp_path / "parts"))
    for found, expected in zip(losses(tmp_path / "parts"), losses(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    found, expected = adapter_tensors(tmp_path / "parts"), adapter_tensors(tmp_path / "whole")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_finetune_starts_anew_from_the_adapter(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "first", TP2_SP)
    tune(base, tmp_path / "second", TP2_SP, {}, lora_load=str(tmp_path / "first"), finetune=True)
    first, second = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert len(second) == STEPS
    assert second[0] < first[0], "the adapter of the first run is where the second begins"
    assert second[0] != first[-1]


def test_resume_refuses_another_order_of_samples(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "run", TP2_SP, exit_interval=STOP)
    with pytest.raises(AssertionError, match=r"order of samples would change on resume \(seed 1234 -> 5\)"):
        tune(base, tmp_path / "run", TP2_SP, {}, lora_load=str(tmp_path / "run"), seed=5)
    assert issubclass(UserError, ValueError)


def test_the_adapter_starts_bit_identical_at_every_layout(base: Path, tmp_path: Path) -> None:
    for name, parallel in (("tp2", TP2_SP), ("pp2", PP2), ("dp2", {})):
        tune(base, tmp_path / name, parallel, exit_interval=1)  # the warm-up's first step moves nothing
    expected = adapter_tensors(tmp_path / "dp2")
    for name in ("tp2", "pp2"):
        found = adapter_tensors(tmp_path / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected if key.endswith("lora_A"))
