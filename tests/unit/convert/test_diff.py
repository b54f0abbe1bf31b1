"""convert_ckpt.py diff: equal whatever the format and layout, and every kind of difference named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.peft import write_peft
from modellink_lora.cli.convert import main
from modellink_lora.cli.main import run
from tests.helpers.conversion import convert, random_adapter
from tests.helpers.foreign import make_foreign
from tests.helpers.made_model import Dimensions, made_model

SIZE = Dimensions(layers=4)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model(tmp_path_factory.mktemp("diff") / "hf", SIZE)


def diff(a: Path, b: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    status = run(lambda: main(["diff", str(a), str(b), *words]))
    seen = capsys.readouterr()
    return status, seen.out + seen.err


def changed(hf: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a model with some tensors replaced, or with None removed."""
    folder.mkdir()
    (folder / "config.json").write_text((hf / "config.json").read_text())
    held = {**load_file(hf / "model.safetensors"), **{name.replace("__", "."): t for name, t in tensors.items()}}
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_model_in_every_layout_is_equal(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(hf, tmp_path / "a", to="mg", target_tensor_parallel_size=2, make_vocab_size_divisible_by=16)
    convert(hf, tmp_path / "b", to="mg", target_pipeline_parallel_size=2, num_layers_per_virtual_pipeline_stage=1,
            use_mcore_models=True)  # fmt: skip
    for a, b in ((hf, tmp_path / "a"), (tmp_path / "a", tmp_path / "b"), (tmp_path / "b/iter_0000001", hf)):
        assert diff(a, b, capsys)[1].endswith("equal: 27 tensors\n")
        assert diff(a, b, capsys)[0] == 0


def test_a_changed_value_is_measured_and_within_the_tolerance_passed_over(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norm = load_file(hf / "model.safetensors")["model.norm.weight"].clone()
    norm[3] += 0.25
    other = changed(hf, tmp_path / "other", model__norm__weight=norm)
    status, said = diff(hf, other, capsys)
    assert status == 1 and "decoder.final_layernorm.weight: greatest |difference| 0.25, 1 of 8 values" in said
    assert "1 of 27 tensors differ" in said
    assert diff(hf, other, capsys, "--tolerance", "0.5")[0] == 0
    nan = changed(hf, tmp_path / "nan", model__norm__weight=norm * float("nan"))
    assert "greatest |difference| inf" in diff(hf, nan, capsys, "--tolerance", "0.5")[1]


def test_other_names_shapes_and_dtypes_are_named(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shallow = made_model(tmp_path / "shallow", dataclasses.replace(SIZE, layers=3))
    status, said = diff(hf, shallow, capsys, "--lines", "0")
    assert status == 1 and "decoder.layers.3.mlp.linear_fc2.weight: only in A" in said
    assert "only in B" in diff(shallow, hf, capsys, "--lines", "0")[1]
    wide = made_model(tmp_path / "wide", dataclasses.replace(SIZE, vocab=21))
    assert "embedding.word_embeddings.weight: shape [19, 8] in A, [21, 8] in B" in diff(hf, wide, capsys)[1]
    convert(hf, tmp_path / "bf16", to="mg", params_dtype="bf16")
    assert "float32 and bfloat16" in diff(hf, tmp_path / "bf16", capsys)[1]


def test_adapters_of_all_three_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = make_foreign(tmp_path)
    ranks = foreign.modellink(tmp_path / "ranks", tp=2, legacy=True)
    write_peft(tmp_path / "peft", open_adapter(foreign.own), base_model=None)
    for other in (ranks, tmp_path / "peft"):
        status, said = diff(foreign.own, other, capsys, "--base", str(foreign.mg))
        assert (status, "equal: " in said) == (0, True), said
    model = made_model(tmp_path / "hf", SIZE)
    a, b = (random_adapter(tmp_path / f"a{seed}", model, seed=seed) for seed in (1, 2))
    assert diff(a, b, capsys)[0] == 1
    same = random_adapter(tmp_path / "stronger", model, seed=1, alpha=16.0)
    assert "scaling: 2 in A, 4 in B" in diff(a, same, capsys)[1]


@pytest.mark.parametrize("words, line", [
    ([], "give two folders to compare, before any flag; 0 were given"),
    (["a"], "1 were given"),
    (["/absent", "/absent"], "/absent: no such folder"),
])  # fmt: skip
def test_what_cannot_be_compared(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = run(lambda: main(["diff", *words]))
    except SystemExit as end:
        status = int(str(end.code))
    assert status != 0 and line in capsys.readouterr().err
