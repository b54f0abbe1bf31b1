"""Dropout of adapters, hidden states, embeddings and attention drops the same elements however the work is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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

TP2, SP, PP2 = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
VPP2 = {"num_layers_per_virtual_pipeline_stage": 1}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1, "recompute_method": "uniform"}
DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
ROUNDING = 1e-5  # relative, fp32, six steps
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "micro-batches of four": (1, {}, {"micro_batch_size": 4, "loss_reduction": "token"}),
    "micro-batches of one": (1, {}, {"loss_reduction": "token"}),
    "full recompute": (1, {}, FULL),
    "tp2": (2, TP2, {}),
    "tp2-sp": (2, TP2 | SP, {}),
    "tp2-sp, full recompute": (2, TP2 | SP, FULL),
    "tp2-sp, selective recompute": (2, TP2 | SP, {"recompute_granularity": "selective"}),
    "pp2-vpp2": (2, PP2 | VPP2, {}),
    "pp2, full recompute": (2, PP2, FULL),
    "dp2": (2, {}, {}),
    "tp4-sp": (4, TP4 | SP, {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropout")
    write_corpus(folder / "data")
    return hf_to_megatron(tiny_model("llama", folder / "hf", layers=4, num_key_value_heads=4), folder / "mg")


def tune(base: Path, save: Path, layout: str, dropouts: dict[str, float] = DROPOUTS, **more: Any) -> list[float]:
    world, parallel, settings = LAYOUTS.get(layout, (1, {}, {}))
    run(
        fine_tune_here,
        world_size=world,
        train=train_flags(load=str(base), save=str(save), train_iters=6, **settings, **more),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dropout": 0.1 if dropouts else 0.0},
        model=dropouts,
    )
    return losses(save)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tune(base, folder / "micro-batch", "one process")
    tune(base, folder / "token", "one process", loss_reduction="token")
    return folder


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.slow if x in ("tp4-sp", "tp2-sp, full recompute") else ()) for x in LAYOUTS],
)
def test_the_run_with_dropout_is_the_same_at_every_layout(layout: str, base: Path, plain: Path, tmp_path: Path) -> None:
    expected = plain / LAYOUTS[layout][2].get("loss_reduction", "micro-batch")
    assert tune(base, tmp_path, layout) == pytest.approx(losses(expected), rel=ROUNDING)
    found = adapter_tensors(tmp_path)
    for name, tensor in adapter_tensors(expected).items():
        # AdamW divides by the root of the second moment: an element that hardly moves shows rounding the most
        assert (found[name] - tensor).abs().max() < 1e-4


def test_dropout_does_something_and_follows_the_seed(base: Path, plain: Path, tmp_path: Path) -> None:
    with_dropout = losses(plain / "micro-batch")
    without = tune(base, tmp_path / "without", "one process", {})
    assert with_dropout != pytest.approx(without, rel=1e-3)
    for only in ("hidden_dropout", "attention_dropout"):
        assert tune(base, tmp_path / only, "one process", {only: 0.1}) != pytest.approx(with_dropout, rel=1e-4)
