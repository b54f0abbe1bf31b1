"""Steps that are replayed from a recording are ordinary steps, bit by bit; a recording that is not is found out.

The recorder is a double on the CPU that runs operators on the addresses of the recording and no Python of ours, as a
CUDA graph does. Whether CUDA records what it records is not shown here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.graphs import fine_tune_recorded
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
STEPS = 7  # 3 ordinary, 2 compared, of the last 2 one more than a step that is measured


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_corpus(folder / "data", samples=40)
    return folder


def train(
    bases: Path, save: Path, layout: str, impl: str, *, family: str = "llama", broken: dict[str, Any] | None = None,
    **flags: Any,
) -> tuple[str, int, int]:  # fmt: skip
    base = bases / family
    if not base.exists():
        hf_to_megatron(tiny_model(family, bases / f"{family}-hf"), base, tp=2)
    said = run(
        fine_tune_recorded,
        world_size=2,
        broken=broken or {},
        train=train_flags(load=str(base), save=str(save), cuda_graph_impl=impl, train_iters=STEPS, **flags),
        data={"data_path": (str(bases / "data"),), "seq_length": 24, "variable_seq_lengths": False},
        parallel=LAYOUTS[layout],
        lora={"r": 3, "alpha": 6.0, "target_modules": TARGETS, "dropout": 0.1},
    )
    assert said[0] == said[1], "the processes came to different ends"
    return said[0]


def assert_replays_are_steps(bases: Path, tmp_path: Path, layout: str, **flags: Any) -> None:
    assert train(bases, tmp_path / "ordinary", layout, "none", **flags) == ("", 0, 0)
    assert train(bases, tmp_path / "replayed", layout, "local", **flags) == ("", 1, STEPS - 3)
    assert losses(tmp_path / "replayed") == losses(tmp_path / "ordinary")
    ordinary, replayed = adapter_tensors(tmp_path / "ordinary"), adapter_tensors(tmp_path / "replayed")
    assert ordinary.keys() == replayed.keys() != set()
    assert all(torch.equal(ordinary[name], replayed[name]) for name in ordinary)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_adapters_are_those_of_ordinary_steps(layout: str, bases: Path, tmp_path: Path) -> None:
    assert_replays_are_steps(bases, tmp_path, layout)


def test_so_are_those_of_the_fused_path(bases: Path, tmp_path: Path) -> None:
    assert_replays_are_steps(bases, tmp_path, "tp2-sp", lora_fusion=True, lora_fusion_chunks="2")


def test_so_are_those_of_low_precision_and_the_distributed_optimizer(bases: Path, tmp_path: Path) -> None:
    flags = {"bf16": True, "use_distributed_optimizer": True, "loss_reduction": "token", "deterministic": True}
    assert_replays_are_steps(bases, tmp_path, "dp2", **flags)


# 1 + weight, scaled embeddings, norms behind attention and MLP, soft caps; norms of heads; ALiBi and biases
@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3", "bloom"])
def test_so_are_those_of_other_families(family: str, fused: bool, bases: Path, tmp_path: Path) -> None:
    assert_replays_are_steps(bases, tmp_path, "tp2-sp", family=family, lora_fusion=fused)


def test_a_measured_step_is_an_ordinary_one(bases: Path, tmp_path: Path) -> None:
    assert train(bases, tmp_path, "dp2", "local", log_interval=STEPS) == ("", 1, STEPS - 3 - 1)
    (measured,) = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "backward ms" in line]
    assert f'"iteration": {STEPS}' in measured and '"backward ms": 0.0' not in measured


@pytest.mark.parametrize(
    ("layout", "broken", "flags", "other"),
    [
        (
            "dp2",
            {"numpy_masks": True},
            {},
            "losses",
        ),  # made outside of the recording, so of the recorded samples for ever
        ("dp2", {"numpy_masks": True}, {"bf16": True}, "gradients"),
        ("dp2", {"forgets": "add_"}, {}, "gradients"),  # to the gradients of the step
        ("tp2-sp", {"forgets": "_allgather_base_"}, {}, "losses"),
    ],
    ids=["old masks", "old masks in bf16", "gradients not added", "collective lost"],
)
def test_a_recording_that_is_no_step_ends_the_run(
    layout: str, broken: dict[str, Any], flags: dict[str, Any], other: str, bases: Path, tmp_path: Path
) -> None:
    said, recordings, _ = train(bases, tmp_path, layout, "local", broken=broken, **flags)
    assert f"a replayed step gives other {other} than an ordinary one" in said and said.count("\n") == 0
    assert recordings == 1 and not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_what_cannot_be_recorded_ends_the_run_in_one_line(bases: Path, tmp_path: Path) -> None:
    said, *_ = train(bases, tmp_path, "dp2", "local", broken={"forbids": "mm"})
    assert "could not be recorded (operation not permitted when stream is capturing: mm)" in said
    assert "\n" not in said
