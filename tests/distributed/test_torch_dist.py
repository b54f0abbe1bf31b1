"""Folders that megatron-core's dist_checkpointing wrote are read to the bit, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.megatron_dist import open_megatron
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert, hf_tensors
from tests.helpers.dist_checkpoints import save_adapter_here, save_base_here
from tests.helpers.foreign import Foreign, make_foreign
from tests.helpers.spawn import run

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return make_foreign(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def tp2(foreign: Foreign) -> Path:
    root = foreign.hf.parent / "tp2"
    run(save_base_here, world_size=2, hf=str(foreign.hf), root=str(root), parallel=TP2)
    return root


def assert_is_the_model(root: Path, hf: Path) -> None:
    files, source = open_megatron(root), HfModel(hf)
    assert files.names() == source.names() and files.iteration == 12
    for name in source.names():
        found, expected = files.read(name), source.read(name)
        assert torch.equal(found[: len(expected)], expected), name  # the vocabulary is padded


def test_a_model_saved_at_tp2_is_read(tp2: Path, foreign: Foreign) -> None:
    assert_is_the_model(tp2, foreign.hf)
    assert_is_the_model(tp2 / "iter_0000012", foreign.hf)


def test_the_metadata_of_megatron_core_0_15_is_read(tp2: Path, foreign: Foreign, tmp_path: Path) -> None:
    """It is of a class of its own, with a field beside those of torch's."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    root = shutil.copytree(tp2, tmp_path / "root")
    (path,) = root.glob("iter_*/.metadata")
    metadata = pickle.loads(path.read_bytes())
    theirs = type("MCoreMetadata", (type(metadata),), {"__module__": strategies.__name__})
    metadata.__class__, metadata.mcore_data = theirs, {"decoder.weight": {"nd_shape": torch.Size([2, 3])}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "MCoreMetadata", theirs, raising=False)
        path.write_bytes(pickle.dumps(metadata))
    assert_is_the_model(root, foreign.hf)


@pytest.mark.parametrize("metadata", [None, {"singleton_local_shards": True}], ids=["stacked", "layer by layer"])
def test_a_model_saved_at_pp2_is_read(metadata: Any, foreign: Foreign, tmp_path: Path) -> None:
    run(save_base_here, world_size=2, hf=str(foreign.hf), root=str(tmp_path), parallel=PP2, metadata=metadata)
    assert_is_the_model(tmp_path, foreign.hf)


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [None, {"singleton_local_shards": True}], ids=["stacked", "layer by layer"])
def test_a_model_saved_at_tp2_pp2_is_read(metadata: Any, foreign: Foreign, tmp_path: Path) -> None:
    both = {**TP2, **PP2}
    run(save_base_here, world_size=4, hf=str(foreign.hf), root=str(tmp_path), parallel=both, metadata=metadata)
    assert_is_the_model(tmp_path, foreign.hf)


def test_it_converts_to_what_it_was_made_of_and_merges(tp2: Path, foreign: Foreign, tmp_path: Path) -> None:
    for name in ("plain", "merged", "expected"):
        (tmp_path / name).mkdir()
        shutil.copy(foreign.hf / "config.json", tmp_path / name)
    convert(tp2, tmp_path / "plain", to="hf")
    found, expected = hf_tensors(tmp_path / "plain/mg2hg"), hf_tensors(foreign.hf)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    convert(tp2, tmp_path / "merged", to="hf", lora_load=str(foreign.own))
    convert(foreign.mg, tmp_path / "expected", to="hf", lora_load=str(foreign.own))
    found, expected = hf_tensors(tmp_path / "merged/mg2hg"), hf_tensors(tmp_path / "expected/mg2hg")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def bridge_names(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {"lora_A": "linear_in", "lora_B": "linear_out"}
    return {f"{n.rpartition('.')[0]}.adapter.{new[n.rpartition('.')[2]]}.weight": t for n, t in adapter.items()}


@pytest.mark.parametrize("parallel, stacked", [(TP2, True), (PP2, False)], ids=["tp2 stacked", "pp2 layer by layer"])
def test_megatron_bridges_lora_is_read(
    parallel: dict[str, int], stacked: bool, foreign: Foreign, tmp_path: Path
) -> None:
    factors = bridge_names(foreign.adapter)
    run(
        save_adapter_here, world_size=2, hf=str(foreign.hf), root=str(tmp_path / "x"), parallel=parallel,
        factors=factors, alpha=16.0, stacked=stacked,
    )  # fmt: skip
    adapter = open_adapter(tmp_path / "x", base=lambda: HfModel(foreign.hf).config)
    assert adapter.shapes == {name: tuple(tensor.shape) for name, tensor in foreign.adapter.items()}
    assert all(torch.equal(adapter.read(name), tensor) for name, tensor in foreign.adapter.items())
    assert (adapter.meta.lora.r, adapter.meta.lora.alpha, adapter.meta.iteration) == (4, 16.0, 12)


@pytest.mark.parametrize("parallel", [TP2, PP2], ids=["tp2", "pp2"])
def test_megatron_bridges_canonical_lora_comes_apart_into_its_projections(
    parallel: dict[str, int], foreign: Foreign, tmp_path: Path
) -> None:
    config = HfModel(foreign.hf).config
    generator = torch.Generator().manual_seed(1)
    factors, expected = {}, {}
    for layer in range(config.num_layers):
        for block, module, parts in (
            ("self_attention", "linear_qkv", {"adapter_q": "q", "adapter_v": "v"}), ("mlp", "linear_fc2", {"": "down"}),
            ("mlp", "linear_fc1", {"adapter_gate": "gate", "adapter_up": "up"}),
        ):  # fmt: skip
            for part, hf in parts.items():
                sizes = {"q": (64, 64), "v": (32, 64), "gate": (128, 64), "up": (128, 64), "down": (64, 128)}[hf]
                prefix = f"decoder.layers.{layer}.{block}.{module}.adapter." + (f"{part}." if part else "")
                theirs = f"base_model.model.model.layers.{layer}.{'self_attn' if len(hf) == 1 else 'mlp'}.{hf}_proj"
                for kind, factor, shape in (("in", "A", (4, sizes[1])), ("out", "B", (sizes[0], 4))):
                    tensor = torch.randn(shape, generator=generator)
                    factors[f"{prefix}linear_{kind}.weight"] = expected[f"{theirs}.lora_{factor}.weight"] = tensor
    where = {"hf": str(foreign.hf), "root": str(tmp_path / "x"), "parallel": parallel}
    run(save_adapter_here, world_size=2, **where, factors=factors, alpha=8.0)
    convert(foreign.hf, tmp_path / "peft", to="peft", lora_load=str(tmp_path / "x"))
    found = hf_tensors(tmp_path / "peft")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["alpha_pattern"]) == (4, 8.0, {})
    assert set(settings["target_modules"]) == {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


class Executes:
    """A pickle that runs a command when it is loaded the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def poison(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        with (folder / file).open("wb") as stream:
            if file == "common.pt":
                torch.save({"args": Executes(folder / "ran")}, stream)
            else:
                pickle.dump(Executes(folder / "ran"), stream)

    return change


@pytest.mark.parametrize("change, words", [
    (poison(".metadata"), r"\.metadata: contains (posix|os)\.system"),
    (poison("common.pt"), r"common\.pt: contains (posix|os)\.system"),
    (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-40]), r"\.metadata: damaged, cut short"),
    (lambda f: (f / "common.pt").unlink(), r"holds neither args in common\.pt nor run_config\.yaml"),
    (lambda f: (f / "run_config.yaml").write_text("a: ["), r"run_config\.yaml: not valid YAML"),
    (lambda f: (f / "run_config.yaml").write_text("model: {num_layers: 5, num_attention_heads: 4}"), "5 layers"),
])  # fmt: skip
def test_folders_that_are_torn_or_malicious_are_refused_in_one_line(
    change: Callable[[Path], Any], words: str, tp2: Path, tmp_path: Path
) -> None:
    shutil.copytree(tp2, tmp_path / "x")
    change(tmp_path / "x/iter_0000012")
    with pytest.raises(UserError, match=words) as error:
        open_megatron(tmp_path / "x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x/iter_0000012/ran").exists()


@pytest.mark.parametrize("change, words", [
    (lambda f: f.unlink(), r"distcp is missing"),
    (lambda f: f.write_bytes(f.read_bytes()[:99]), r"distcp: (damaged|cut short)"),
    (lambda f: f.write_bytes(bytes(f.stat().st_size)), r"distcp: (damaged|cut short)"),
])  # fmt: skip
def test_torn_pieces_are_refused_when_they_are_read(
    change: Callable[[Path], Any], words: str, tp2: Path, tmp_path: Path
) -> None:
    shutil.copytree(tp2, tmp_path / "x")
    for file in (tmp_path / "x/iter_0000012").glob("*.distcp"):
        change(file)
    files = open_megatron(tmp_path / "x")
    with pytest.raises(UserError, match=words) as error:
        for name in files.names():
            files.read(name)
    assert "\n" not in str(error.value)


def test_a_base_is_no_adapter_and_an_adapter_no_base(tp2: Path, foreign: Foreign, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a model without LoRA factors: give it to --load, not to --lora-load"):
        open_adapter(tp2)
    factors = bridge_names(foreign.adapter)
    where = {"hf": str(foreign.hf), "root": str(tmp_path / "x"), "parallel": TP2}
    run(save_adapter_here, world_size=2, **where, factors=factors, alpha=16.0)
    with pytest.raises(UserError, match="holds an adapter without the layers of its base: give the base to --load and"):
        open_megatron(tmp_path / "x")
    with pytest.raises(UserError, match="give the base checkpoint too"):
        open_adapter(tmp_path / "x")
    (tmp_path / "x/iter_0000012/run_config.yaml").unlink()
    with pytest.raises(UserError, match="does not say its alpha"):
        open_adapter(tmp_path / "x", base=lambda: HfModel(foreign.hf).config)
