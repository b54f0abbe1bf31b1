"""An interrupted and resumed run equals one that was not: bit by bit at its layout, to rounding elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    error_of,
    fine_tune_here,
    hf_to_megatron,
    losses,
    train_flags,
    write_corpus,
)

STOP, MORE = 3, 5  # steps before the interruption, and after it
STEPS = STOP + MORE
ROUNDING = 1e-5  # relative, fp32, over five steps
TP2, SP, PP2 = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # processes, layout, settings
    "tp1": (1, {}, {}),
    "tp2-sp": (2, TP2 | SP, {}),
    "pp2-vpp2": (2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}, {}),
    "pp2": (2, PP2, {}),
    "dp2-distopt": (2, {}, {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
                            "overlap_param_gather": True}),
    "tp2-pp2": (4, TP2 | PP2, {}),
}  # fmt: skip
LORA = {"r": 4, "alpha": 8.0, "target_modules": TARGETS, "dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "data")
    return hf_to_megatron(tiny_model("llama", folder / "hf", layers=4), folder / "mg")


def tune(
    base: Path, save: Path, layout: str, lora: dict[str, Any] = LORA, job: Any = fine_tune_here, **train: Any
) -> Any:
    world, parallel, settings = LAYOUTS[layout]
    return run(
        job,
        world_size=world,
        train=train_flags(
            load=str(base), save=str(save), train_iters=STEPS, lr_decay_style="cosine", min_lr=1e-4,
            lr_warmup_iters=2, **settings, **train,
        ),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32},
        parallel=parallel,
        lora=lora,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At each layout a run that was not interrupted, `whole-LAYOUT`, and one that stopped early, `part-LAYOUT`."""
    folder = tmp_path_factory.mktemp("runs")
    for layout in LAYOUTS:
        tune(base, folder / f"whole-{layout}", layout, save_interval=STOP)
        part = folder / f"part-{layout}"
        shutil.copytree(folder / f"whole-{layout}", part)
        shutil.rmtree(part / f"iter_{STEPS:07d}")
        (part / "latest_checkpointed_iteration.txt").write_text(str(STOP))
    return folder


@pytest.mark.parametrize("to", LAYOUTS)
def test_any_layout_continues_what_any_other_saved(to: str, base: Path, runs: Path, tmp_path: Path) -> None:
    for of in LAYOUTS:
        if "pp2-vpp2" in (of, to) and not {of, to} <= {"pp2-vpp2", "tp2-sp"}:
            continue  # one way in and one way out show that chunks are found
        save = tmp_path / of
        shutil.copytree(runs / f"part-{of}", save)
        tune(base, save, to, {"dropout": 0.1}, lora_load=str(save))
        found, expected = losses(save), losses(runs / f"whole-{of}")
        assert len(found) == STEPS
        if of == to:
            assert found == expected
            assert_same_files(save, runs / f"whole-{of}")
        else:
            assert found == pytest.approx(expected, rel=ROUNDING), f"saved at {of}"
            # AdamW divides by the root of the second moment: an element that hardly moves shows rounding the most
            for name, tensor in adapter_tensors(runs / f"whole-{of}").items():
                torch.testing.assert_close(adapter_tensors(save)[name], tensor, rtol=0, atol=1e-5)


def assert_same_files(one: Path, other: Path) -> None:
    """Bit by bit: adapter, optimizer state, and everything else that a resumed run reads."""
    one, other = one / f"iter_{STEPS:07d}", other / f"iter_{STEPS:07d}"
    for name in ("adapter", "optimizer"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert (one / "training.json").read_text() == (other / "training.json").read_text()


@pytest.mark.parametrize(
    "layout, extra",
    [
        ("pp2", {"bf16": True}),
        ("dp2-distopt", {"bf16": True}),
        ("dp2-distopt", {"fp16": True, "initial_loss_scale": 2.0**10, "loss_scale_window": 3}),
    ],
    ids=["pp2-bf16", "distopt-bf16", "distopt-fp16"],
)
def test_low_precision_resumes_bit_by_bit(layout: str, extra: dict[str, Any], base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "whole", layout, **extra)
    tune(base, tmp_path / "parts", layout, exit_interval=STOP, **extra)
    assert (tmp_path / "parts/latest_checkpointed_iteration.txt").read_text() == str(STOP)
    tune(base, tmp_path / "parts", layout, {"dropout": 0.1}, lora_load=str(tmp_path / "parts"), **extra)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_finetune_starts_anew_from_the_adapter(base: Path, runs: Path, tmp_path: Path) -> None:
    first = runs / "whole-tp2-sp"
    tune(base, tmp_path, "tp2-sp", {"dropout": 0.0}, lora_load=str(first), finetune=True)
    assert len(losses(tmp_path)) == STEPS
    assert losses(tmp_path)[0] < losses(first)[0], "the adapter of the first run is where the second begins"


@pytest.mark.parametrize("change", ["seed", "data"])
def test_resume_refuses_other_samples_or_another_order(change: str, base: Path, runs: Path, tmp_path: Path) -> None:
    if change == "seed":
        expected, settings = "order would change on resume \\(seed 1234 -> 5\\)", {"seed": 5}
    else:  # the same number of samples at the same place, preprocessed again
        expected, settings = "order would change on resume \\(data [0-9a-f]+ -> [0-9a-f]+\\)", {}
        shutil.copytree(base.parent, tmp_path / "copy")
        base = tmp_path / "copy" / base.name
        write_corpus(base.parent / "data", seed=1)
    part = str(runs / "part-tp2-sp")
    for said in tune(base, tmp_path / "run", "tp2-sp", {}, error_of, lora_load=part, **settings):
        assert re.search(expected, said)


def test_the_adapter_starts_bit_identical_at_every_layout(base: Path, tmp_path: Path) -> None:
    for name in ("tp2-sp", "pp2-vpp2", "dp2-distopt"):
        tune(base, tmp_path / name, name, exit_interval=1)  # the warm-up's first step moves nothing
    expected = adapter_tensors(tmp_path / "dp2-distopt")
    for name in ("tp2-sp", "pp2-vpp2"):
        found = adapter_tensors(tmp_path / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected if key.endswith("lora_A"))


def said(**arguments: Any) -> list[str]:
    """What a run tells the user while it goes."""
    from modellink_lora.reporting.report import Reporter

    lines: list[str] = []
    with mock.patch.object(Reporter, "say", lambda _, text: lines.append(text)):
        fine_tune_here(**arguments)
    return lines


@pytest.mark.parametrize(("wanted", "tests"), [(3, 1), (2, 0)], ids=["at its end", "beyond its end"])
def test_a_run_resumed_where_nothing_is_left_says_so_and_trains_nothing(
    wanted: int, tests: int, base: Path, tmp_path: Path
) -> None:
    """At its end the test that an interruption may have cut off is run; beyond, nothing is."""

    def resumed(iterations: int, **train: Any) -> list[str]:
        return run(
            said,
            world_size=2,
            train=train_flags(load=str(base), save=str(tmp_path), train_iters=iterations, eval_iters=1, **train),
            data={"data_path": (str(base.parent / "data"),), "seq_length": 32, "split": "60,20,20"},
            parallel=TP2,
            lora={"dropout": 0.1} if train else LORA,
        )[0]

    def test_losses(lines: list[str]) -> list[str]:
        return [line for line in lines if line.startswith(" test loss at iteration 3 ")]

    first = resumed(3)
    before = (tmp_path / "iter_0000003/training.json").stat().st_mtime_ns
    lines = resumed(wanted, lora_load=str(tmp_path))
    (line,) = [line for line in lines if "nothing left to do" in line]
    assert f"stands at iteration 3, --train-iters says {wanted}; raise --train-iters above 3" in line
    assert "--finetune" in line and "\n" not in line
    assert len(test_losses(first)) == 1 and test_losses(lines) == test_losses(first) * tests
    assert len(losses(tmp_path)) == 3 and not [line for line in lines if "validation loss" in line or "saving" in line]
    assert (tmp_path / "iter_0000003/training.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "run.json").read_text())["sessions"][-1]["status"] == "completed"


def test_a_resumed_run_tells_what_it_found(base: Path, runs: Path, tmp_path: Path) -> None:
    training = json.loads((runs / f"whole-tp1/iter_{STEPS:07d}/training.json").read_text())
    assert training["iteration"] == STEPS and training["consumed_samples"] == 4 * STEPS
    assert training["layout"] == {"tensor": 1, "pipeline": 1, "data": 1, "sequence_parallel": False}
