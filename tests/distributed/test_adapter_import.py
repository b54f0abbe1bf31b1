"""Runs that start from an adapter of ModelLink's or PEFT's take, at any layout, the steps that our own format gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.conversion import convert
from tests.helpers.foreign import SOURCES, Foreign, make_foreign
from tests.helpers.spawn import run
from tests.helpers.tiny import VOCAB
from tests.helpers.training import TARGETS, adapter_tensors, fine_tune_here, losses, train_flags, write_corpus

STEPS, ROUNDING = 3, 1e-5  # relative, fp32
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
# layout of the run, and the rank files that it starts from
CASES = {
    "tp1 from tp2-pp2": ({}, "tp2-pp2", False),
    "tp2-sp from pp2-vpp2, legacy": (TP2_SP, "pp2-vpp2", True),
    "pp2 from tp2, legacy": (PP2, "tp2", True),
    "pp2-vpp2 from uneven stages": (VPP2, "uneven", False),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    folder = tmp_path_factory.mktemp("import")
    write_corpus(folder / "data")
    return make_foreign(folder)


def tune(
    foreign: Foreign,
    save: Path,
    parallel: dict[str, Any],
    lora: dict[str, Any] | None = None,
    model: Any = None,
    world_size: int = 2,
    **train: Any,
) -> list[float]:
    """Losses of the first steps."""
    run(
        fine_tune_here, world_size=world_size,
        train={**train_flags(load=str(foreign.mg), save=str(save), train_iters=STEPS, finetune=True), **train},
        data={"data_path": (str(foreign.mg.parent / "data"),), "seq_length": 32}, parallel=parallel, lora=lora or {},
        model=model,
    )  # fmt: skip
    return losses(save)


@pytest.fixture(scope="module")
def reference(foreign: Foreign, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Two replicas from the adapter in our own format."""
    return tune(foreign, tmp_path_factory.mktemp("reference"), {}, lora_load=str(foreign.own))


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_modellinks_adapter_takes_the_steps_of_one_from_ours(
    case: str, foreign: Foreign, reference: list[float], tmp_path: Path
) -> None:
    parallel, source, legacy = CASES[case]
    theirs = foreign.modellink(tmp_path / "theirs", legacy=legacy, **SOURCES[source])
    found = tune(foreign, tmp_path / "run", parallel, lora_load=str(theirs))
    assert len(found) == STEPS and found == pytest.approx(reference, rel=ROUNDING)


def test_the_adapter_is_seen_in_the_losses(foreign: Foreign, reference: list[float], tmp_path: Path) -> None:
    fresh = {"r": 4, "alpha": 16.0, "target_modules": TARGETS}
    assert tune(foreign, tmp_path, {}, fresh)[0] != pytest.approx(reference[0], rel=1e-2)


def test_load_alone_takes_base_and_adapter_from_one_checkpoint(
    foreign: Foreign, reference: list[float], tmp_path: Path
) -> None:
    both = foreign.modellink(tmp_path / "both", tp=2, pp=2)
    # a file of theirs does not tell padding rows from tokens
    assert tune(foreign, tmp_path / "run", TP2_SP, load=str(both), model={"vocab_size": VOCAB}) == pytest.approx(
        reference, rel=ROUNDING
    )
    # the adapter trained from there belongs to the base in those files
    again = {"load": str(both), "lora_load": str(tmp_path / "run"), "finetune": False, "train_iters": STEPS + 1}
    assert len(tune(foreign, tmp_path / "run", TP2_SP, model={"vocab_size": VOCAB}, **again)) == STEPS + 1


def test_a_run_from_a_peft_folder_takes_the_steps_of_one_from_ours(
    foreign: Foreign, reference: list[float], tmp_path: Path
) -> None:
    convert(foreign.mg, tmp_path / "peft", to="peft", lora_load=str(foreign.own))
    found = tune(foreign, tmp_path / "run", PP2, lora_load=str(tmp_path / "peft"))
    assert found == pytest.approx(reference, rel=ROUNDING)


def test_linears_that_a_peft_adapter_leaves_out_learn_with_the_others(foreign: Foreign, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    convert(foreign.mg, folder, to="peft", lora_load=str(foreign.own))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.3." in name and "k_proj" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"layers_to_transform": [3], "exclude_modules": ["k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = tune(foreign, tmp_path / "run", TP2_SP, lora_load=str(folder))
    assert len(found) == STEPS and all(tensor.any() for tensor in adapter_tensors(tmp_path / "run").values())


def test_an_adapter_from_elsewhere_starts_a_run_but_resumes_none(foreign: Foreign, tmp_path: Path) -> None:
    theirs = foreign.modellink(tmp_path / "theirs", tp=2, legacy=True)
    with pytest.raises(AssertionError, match=r"adapter of ModelLink .*cannot be resumed; give --finetune to start"):
        tune(foreign, tmp_path / "run", PP2, lora_load=str(theirs), finetune=False)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_four_processes_take_the_same_steps_from_every_source(
    source: str, foreign: Foreign, reference: list[float], tmp_path: Path
) -> None:
    theirs = foreign.modellink(tmp_path / "theirs", legacy=source != "tp2-pp2", **SOURCES[source])
    found = tune(foreign, tmp_path / "run", {**TP2_SP, **PP2}, lora_load=str(theirs), world_size=4)
    assert found == pytest.approx(reference, rel=ROUNDING)
