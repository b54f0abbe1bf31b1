"""Models and adapters that are damaged, hostile or not what they seem: one line, a failing status, nothing written.

test_conversion_safety.py has rank files that are missing or cut short, full disks and killed programs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.cli.convert import main
from modellink_lora.cli.main import run
from tests.golden import modellink_adapter, modellink_base
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model, made_sharded_model

SIZE = Dimensions(layers=2, hidden=16)
NORM, BIAS = "decoder.layers.1.input_layernorm.weight", "decoder.layers.0.self_attention.linear_proj.bias"
INDEX = "model.safetensors.index.json"


class Evil:
    """Pickles as a shell command that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def outcome(
    capsys: pytest.CaptureFixture[str], load: Path, save: Path, to: str, *words: object
) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a conversion of `load`."""
    kind = "hf" if (load / "config.json").is_file() else "mg"
    command = ["--load-model-type", kind, "--load-dir", load, "--save-model-type", to, "--save-dir", save, *words]
    capsys.readouterr()
    status = run(lambda: main([str(word) for word in command]))
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], load: Path, tmp_path: Path, to: str, *words: object) -> str:
    """The line that a conversion ends with; before it only the bar of one that had begun to write."""
    before = set(tmp_path.rglob("*"))
    status, _, err = outcome(capsys, load, tmp_path / "out", to, *words)
    *rest, line = err.rstrip("\n").split("\n")
    assert status == 1 and line.startswith("error: ") and "Traceback" not in err, err
    assert all(text.startswith(("\r", "writing")) for text in rest), rest
    assert set(tmp_path.rglob("*")) == before, "something was written"
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model(tmp_path_factory.mktemp("model") / "hf", SIZE)


@pytest.fixture(scope="module")
def full(model: Path) -> dict[str, torch.Tensor]:
    """Its Megatron tensors, with a bias behind the attention's output."""
    tensors = modellink_base.megatron_tensors(hf_tensors(model), modellink_base.LLAMA, heads=4, groups=2)
    for layer in range(SIZE.layers):
        at = f"decoder.layers.{layer}.self_attention."
        tensors |= {f"{at}linear_qkv.bias": torch.rand(32), f"{at}linear_proj.bias": torch.rand(16)}
    return tensors


def edit(root: Path, change: Callable[[dict[str, Any]], Any], rank: str = "mp_rank_*") -> None:
    for file in sorted(root.glob(f"*/{rank}/model_optim_rng.pt")):
        with pytest.MonkeyPatch.context() as patch:
            for name, module in modellink_base.megatron_modules().items():
                patch.setitem(sys.modules, name, module)
            document = torch.load(file, weights_only=False)
            change(document)
            torch.save(document, file)


@pytest.mark.parametrize("name", [NORM, BIAS])
@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
def test_copies_of_a_tensor_that_differ_between_ranks(
    name: str, legacy: bool, full: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = modellink_base.write(tmp_path / "mg", full, heads=4, groups=2, tp=2, pp=2, legacy=legacy)
    status, _, err = outcome(capsys, root, tmp_path / "good", "mg")
    assert status == 0, err

    def drift(document: dict[str, Any]) -> None:
        held = document["model"]["language_model"]["encoder"] if legacy else document["model"]
        for key in held:
            if key.endswith(("layers.0.input_norm.weight", "layers.0.self_attention.dense.bias", "layers.0."
                             "input_layernorm.weight", "layers.0.self_attention.linear_proj.bias")):  # fmt: skip
                held[key][0] += 1e-3

    edit(root, drift, "mp_rank_01_001" if name == NORM else "mp_rank_01_000")
    line = refused(capsys, root, tmp_path, "mg")
    assert "on tensor-parallel ranks 0 and 1 differ" in line and ("layers.1." if name == NORM else "layers.0.") in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@pytest.mark.parametrize("to", ["mg", "hf", "meta"])
def test_weights_that_are_no_numbers(
    to: str, value: float, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "hf")
    tensors = hf_tensors(model)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, tmp_path / "hf", tmp_path, to)
    assert line.startswith("error: decoder.layers.1.mlp.linear_fc2.weight: holds NaN or infinity")


def test_large_but_finite_weights_are_no_error(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "hf")
    tensors = hf_tensors(model)
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    assert outcome(capsys, tmp_path / "hf", tmp_path / "out", "mg")[0] == 0


def test_an_adapter_that_is_no_number(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = random_adapter(tmp_path / "adapter", model)
    (file,) = adapter.glob("iter_*/adapter.safetensors")
    tensors = load_file(file)
    tensors["decoder.layers.0.mlp.linear_fc1.lora_B"][0, 0] = float("nan")
    save_file(tensors, file)
    line = refused(capsys, model, tmp_path, "hf", "--lora-load", adapter)
    assert "adapter.safetensors: damaged (its CRC-32 differs" in line
    document = json.loads(file.with_name("adapter.json").read_text())
    file.with_name("adapter.json").write_text(json.dumps({k: v for k, v in document.items() if k != "crc32"}))
    line = refused(capsys, model, tmp_path, "hf", "--lora-load", adapter)
    assert "decoder.layers.0.mlp.linear_fc1.lora_B holds nan or inf" in line


@pytest.mark.parametrize("to", ["peft", "adapter", "adapter-ranks", "gguf-adapter"])
def test_an_adapter_is_not_exported_for_another_base(
    to: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = random_adapter(tmp_path / "adapter", model)
    other = made_model(tmp_path / "other", SIZE, seed=1)
    line = refused(capsys, other, tmp_path, to, "--lora-load", adapter)
    assert f"--lora-load {adapter} was trained on another base than --load-dir {other}" in line
    assert outcome(capsys, model, tmp_path / "good", to, "--lora-load", adapter)[0] == 0


def _lacking(root: Path) -> None:
    index = json.loads((root / INDEX).read_text())
    file = root / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def _extra(root: Path) -> None:
    file = min(root.glob("*.safetensors"))
    save_file({**load_file(file), "model.layers.0.surprise": torch.zeros(2)}, file, metadata={"format": "pt"})


def _twice(root: Path) -> None:
    first, *_, last = sorted(root.glob("*.safetensors"))
    (name, tensor), *_ = load_file(first).items()
    save_file({**load_file(last), name: tensor + 1}, last, metadata={"format": "pt"})


@pytest.mark.parametrize("spoil, words", [
    (lambda root: min(root.glob("*.safetensors")).unlink(), "names model-00001-of-"),
    (_lacking, "lacks model.norm.weight, which model.safetensors.index.json says it holds"),
    (_extra, "holds 1 tensors that this model type does not have: model.layers.0.surprise"),
    (_twice, "which another file of the model holds as well"),
    (lambda root: (root / INDEX).write_text("{"), "not valid JSON"),
    (lambda root: (root / "config.json").write_text('{"model_type": "llama"}'), "num_attention_heads is None"),
])  # fmt: skip
def test_folders_of_hugging_face_whose_files_disagree(
    spoil: Callable[[Path], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made_sharded_model(tmp_path / "hf", SIZE, tensors_a_file=6)
    spoil(root)
    assert words in refused(capsys, root, tmp_path, "mg")


def test_of_two_kinds_of_files_the_safe_one_is_read_and_the_other_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "hf")
    torch.save(hf_tensors(model), tmp_path / "hf/pytorch_model.bin")
    save_file({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "hf/consolidated.safetensors")
    status, said, err = outcome(capsys, tmp_path / "hf", tmp_path / "out", "hf")
    assert status == 0, err
    for name in ("pytorch_model.bin", "consolidated.safetensors"):
        assert f"not used: {name} (the weights are read from model.safetensors)" in said
    found, expected = hf_tensors(tmp_path / "out/mg2hg"), hf_tensors(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("where", ["base", "adapter in rank files", "adapter of PEFT", "Hugging Face"])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(
    where: str, model: Path, full: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, words = tmp_path / "ran", []
    evil = {"weight": Evil(marker)}
    if where == "base":
        load = modellink_base.write(tmp_path / "mg", full, heads=4, groups=2)
        edit(load, lambda document: document.update(evil))
    elif where == "adapter in rank files":
        load, plain = model, {name: tensor for name, tensor in full.items() if not name.endswith("bias")}
        factors = {"lora_A": torch.rand(2, 16), "lora_B": torch.rand(16, 2)}
        adapter = {f"decoder.layers.{i}.self_attention.linear_proj.{n}": t for i in (0, 1) for n, t in factors.items()}
        words = ["--lora-load", modellink_adapter.write(tmp_path / "lora", plain, adapter, heads=4, groups=2)]
        edit(tmp_path / "lora", lambda document: document.update(evil))
    elif where == "adapter of PEFT":
        load, words = model, ["--lora-load", tmp_path / "peft"]
        convert(model, tmp_path / "peft", to="peft", lora_load=str(random_adapter(tmp_path / "own", model)))
        (tmp_path / "peft/adapter_model.safetensors").unlink()
        torch.save(evil, tmp_path / "peft/adapter_model.bin")
    else:
        load = tmp_path / "hf"
        load.mkdir()
        shutil.copy(model / "config.json", load)
        torch.save(evil, load / "pytorch_model.bin")
    line = refused(capsys, load, tmp_path, "mg", *words)
    assert any(word in line for word in ("which weights do not need", "cannot be read safely", "are not read")), line
    assert not marker.exists()
    (file,) = [path for path in tmp_path.rglob("*") if path.name.endswith((".pt", ".bin"))]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modellink_base.megatron_modules().items():
            patch.setitem(sys.modules, name, module)
        torch.load(file, weights_only=False)
    assert marker.exists(), "the file must be dangerous for the test to mean anything"
