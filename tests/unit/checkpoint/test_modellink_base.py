"""Bases that ModelLink's converter and training wrote: out come the very tensors that went in, at every layout."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.config.errors import UserError
from tests.golden import modellink_base
from tests.golden.modellink_base import BLOOM, GEMMA2, LLAMA
from tests.helpers.conversion import convert, hf_tensors
from tests.helpers.made_model import Dimensions, made_model
from tests.helpers.tiny import tiny_model

PLAIN = Dimensions(layers=4, dtype=torch.bfloat16)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the model; of the files
    "legacy": ({}, {"legacy": True}),
    "legacy, trained on 2 x 2 x 2": ({}, {"legacy": True, "trained": True, "npu": True, "tp": 2, "pp": 2, "vpp": 2}),
    "legacy, tied over stages": ({"tied": True}, {"legacy": True, "tp": 2, "pp": 2}),
    "legacy, tied in one": ({"tied": True, "dtype": torch.float32}, {"legacy": True, "trained": True}),
    "legacy, biases": ({"family": "qwen2", "groups": 4}, {"legacy": True, "tp": 2, "multiple": 8}),
    "mcore": ({"dtype": torch.float16}, {}),
    "mcore, 2 x 2": ({"dtype": torch.float16}, {"tp": 2, "pp": 2}),
    "mcore, trained, interleaved": ({}, {"trained": True, "tp": 2, "pp": 2, "vpp": 2, "multiple": 16}),
    "mcore, interleaved on Ascend": ({"tied": True}, {"pp": 2, "vpp": 2, "npu": True}),
    "mcore, list of stages, tied": ({"tied": True}, {"tp": 2, "pp": 2, "layer_list": [1, 3]}),
    "mcore, biases, release": ({"family": "qwen2"}, {"tp": 2, "multiple": 16, "trained": True, "release": True}),
}


def write(root: Path, hf: Path, names: dict[str, str], heads: int, groups: int, **files: Any) -> Path:
    full = modellink_base.megatron_tensors(hf_tensors(hf), names, heads=heads, groups=groups)
    return modellink_base.write(root, full, heads=heads, groups=groups, **files)


def is_back(root: Path, hf: Path, place: Path) -> bool:
    """Whether converting `root` gives the tensors of `hf`, whose config.json is where users have it: in --save-dir."""
    place.mkdir()
    shutil.copy(hf / "config.json", place)
    convert(root, place, to="hf")
    found, expected = hf_tensors(place / "mg2hg"), hf_tensors(hf)
    same = all(t.dtype == expected[name].dtype and torch.equal(t, expected[name]) for name, t in found.items())
    return found.keys() == expected.keys() and same


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_becomes_the_model_it_was_made_of(variant: str, tmp_path: Path) -> None:
    model, files = VARIANTS[variant]
    size = dataclasses.replace(PLAIN, **model)
    hf = made_model(tmp_path / "source", size)
    root = write(tmp_path / "theirs", hf, LLAMA, size.heads, size.groups, **files)
    opened = open_rank_files(root)
    assert opened.dtype == size.dtype and opened.iteration == (
        "release" if files.get("release") else 500 if files.get("trained") else 1
    )
    assert opened.spelling == ("legacy" if files.get("legacy") else "mcore")
    assert (opened.tp, opened.partition.stages, opened.partition.chunks) == tuple(
        files.get(name, 1) for name in ("tp", "pp", "vpp")
    )
    assert is_back(root, hf, tmp_path / "direct")
    # and through a checkpoint of another layout and spelling
    convert(root, tmp_path / "other", to="mg", target_tensor_parallel_size=1 if "tp" in files else 2,
            target_pipeline_parallel_size=4 if files.get("pp") else 2,
            **{"use_mcore_models" if files.get("legacy") else "save_to_legacy": True})  # fmt: skip
    assert open_rank_files(tmp_path / "other").spelling != opened.spelling
    assert is_back(tmp_path / "other", hf, tmp_path / "through")


@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
def test_layer_norms_biases_and_the_norm_of_an_embedding(legacy: bool, tmp_path: Path) -> None:
    hf = tiny_model("bloom", tmp_path / "source", layers=4, tied=True)
    said = {"position_embedding_type": "alibi", "use_rotary_position_embeddings": False}
    root = write(tmp_path / "theirs", hf, BLOOM, 4, 4, legacy=legacy, tp=2, pp=2, vpp=2, gated=False, **said)
    assert is_back(root, hf, tmp_path / "direct")


def test_norms_behind_the_sublayers(tmp_path: Path) -> None:
    hf = tiny_model("gemma2", tmp_path / "source", tied=True)
    said = {"swiglu": False, "geglu": True, "add_rmsnorm_offset": True, "input_embeds_norm": True, "post_norm": True}
    root = write(tmp_path / "theirs", hf, GEMMA2, 4, 2, tp=2, pp=2, **said)
    assert is_back(root, hf, tmp_path / "direct")


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    hf = made_model(tmp_path / "source", PLAIN)
    root = write(tmp_path / "theirs", hf, LLAMA, 4, 2, trained=True, tp=2, npu=True)
    said = convert(root, tmp_path / "out", to="mg", dry_run=True)
    for what in ("*._extra_state", "optimizer", "opt_param_scheduler", "rng_state"):
        assert f"not used: {what} (" in said


def test_what_modellink_did_not_store_is_not_settled_by_resharding(tmp_path: Path) -> None:
    """Its converter reads no rope_theta and no vocabulary: flags must still be able to say them afterwards."""
    hf = made_model(tmp_path / "source", PLAIN)
    root = write(tmp_path / "theirs", hf, LLAMA, 4, 2, legacy=True, tp=2)
    said = convert(root, tmp_path / "again", to="mg", make_vocab_size_divisible_by=32)
    assert "does not tell its vocabulary and rotary settings for certain" in said
    config = open_rank_files(tmp_path / "again", model_flags={"rotary_base": 5e5, "vocab_size": 19}).config
    assert (config.rotary_base, config.vocab_size, config.padded_vocab_size) == (5e5, 19, 32)
    assert open_rank_files(tmp_path / "again").config.vocab_size == 32
    # with its config.json everything is known, and a flag that says otherwise contradicts
    (tmp_path / "known").mkdir()
    document = json.loads((hf / "config.json").read_text())
    (tmp_path / "known/config.json").write_text(json.dumps({**document, "rope_theta": 5e5}))
    assert "for certain" not in convert(root, tmp_path / "known", to="mg")
    config = open_rank_files(tmp_path / "known").config
    assert (config.rotary_base, config.vocab_size, config.padded_vocab_size) == (5e5, 19, 20)
    with pytest.raises(UserError, match=r"--rotary-base 10000\.0 contradicts"):
        open_rank_files(tmp_path / "known", model_flags={"rotary_base": 1e4})


def test_the_files_are_what_they_claim_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The enum under megatron's name, torch_npu's function and storages of an NPU: what a reader must cope with."""
    hf = made_model(tmp_path / "source", PLAIN)
    root = write(tmp_path / "theirs", hf, LLAMA, 4, 2, npu=True)
    (file,) = root.glob("*/mp_rank_00/model_optim_rng.pt")
    content = file.read_bytes()
    for word in (b"cmegatron.core.enums\nModelType", b"torch_npu.utils.storage\n_rebuild_npu_tensor", b"npu:0",
                 b"torch_npu.npu._format\nFormat"):  # fmt: skip
        assert word in content
    for name, module in modellink_base.megatron_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ModuleNotFoundError, match="torch_npu"):
        torch.load(file, map_location="cpu", weights_only=False)


def test_the_maker_knows_nothing_of_the_program() -> None:
    tree = ast.parse(Path(modellink_base.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    foreign = {m for m in modules if m.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"torch", "tests.golden.modellink_adapter"}


def test_the_maker_runs_from_the_command_line(tmp_path: Path) -> None:
    hf = made_model(tmp_path / "source", PLAIN)
    torch.save(hf_tensors(hf), tmp_path / "model.pt")
    words = f"--hf {tmp_path}/model.pt --out {tmp_path}/theirs --heads 4 --groups 2 --tp 2 --pp 2 --legacy --trained"
    modellink_base.main(words.split())
    assert is_back(tmp_path / "theirs", hf, tmp_path / "direct")
