"""Conversions end to end in one process: the same bits back whatever layout and spelling they went through."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.tiny import FAMILIES, tiny_model

MCORE, LEGACY = {"use_mcore_models": True}, {"save_to_legacy": True}
TP2_PP2: dict[str, Any] = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}


def same(found: Path, expected: Path) -> bool:
    a, b = hf_tensors(found), hf_tensors(expected)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(family, tied) -> five-layer Hugging Face model."""
    folder = tmp_path_factory.mktemp("models")
    kinds = product(FAMILIES, (False, True))
    return {(f, tied): tiny_model(f, folder / f"{f}-{tied}", layers=5, tied=tied, tokenizer=True) for f, tied in kinds}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spelling", [MCORE, LEGACY], ids=["mcore", "legacy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bits(
    models: dict[tuple[str, bool], Path], tmp_path: Path, family: str, spelling: dict[str, bool], tied: bool
) -> None:
    source = models[family, tied]
    convert(source, tmp_path / "mg", to="mg", num_layer_list="3,2", **TP2_PP2, **spelling)
    assert open_rank_files(tmp_path / "mg").config.padded_vocab_size == 260
    convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    assert same(tmp_path / "hf/mg2hg", source)
    assert json.loads((tmp_path / "hf/mg2hg/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert (tmp_path / "hf/mg2hg/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("target", [
    {**MCORE}, {**LEGACY}, {**LEGACY, **TP2_PP2, "num_layer_list": "1,4"},
    {**MCORE, "target_tensor_parallel_size": 2, "make_vocab_size_divisible_by": 64},
])  # fmt: skip
def test_from_layout_to_layout(models: dict[tuple[str, bool], Path], tmp_path: Path, target: dict[str, Any]) -> None:
    source = models["qwen2", True]
    convert(source, tmp_path / "a", to="mg", num_layer_list="2,3", **TP2_PP2, **MCORE)
    convert(tmp_path / "a", tmp_path / "b", to="mg", **target)
    rows = open_rank_files(tmp_path / "b").config.padded_vocab_size
    assert rows == (384 if "make_vocab_size_divisible_by" in target else 260)
    convert(tmp_path / "b", tmp_path / "hf", to="hf")
    assert same(tmp_path / "hf/mg2hg", source)


def test_padding_is_redone_where_the_new_size_does_not_divide(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_key_value_heads=4)
    convert(source, tmp_path / "a", to="mg", target_tensor_parallel_size=1)
    convert(tmp_path / "a", tmp_path / "b", to="mg", target_tensor_parallel_size=4)
    assert open_rank_files(tmp_path / "b").config.padded_vocab_size == 260
    convert(tmp_path / "b", tmp_path / "hf", to="hf")
    assert same(tmp_path / "hf/mg2hg", source)


def test_dtype_is_the_sources_own_unless_asked_for(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", dtype=torch.bfloat16)
    convert(source, tmp_path / "a", to="mg")
    assert open_rank_files(tmp_path / "a").dtype == torch.bfloat16
    convert(tmp_path / "a", tmp_path / "hf", to="hf", params_dtype="fp32")
    found = hf_tensors(tmp_path / "hf/mg2hg")
    assert all(torch.equal(found[n], t.float()) for n, t in hf_tensors(source).items())
    assert json.loads((tmp_path / "hf/mg2hg/config.json").read_text())["dtype"] == "float32"


def test_without_config_json_there_is_no_hf_result(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    source = models["llama", False]
    convert(source, tmp_path / "mg", to="mg")
    for file in (tmp_path / "mg/hf").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"put the config.json and tokenizer files"):
        convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text((source / "config.json").read_text())
    convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    assert same(tmp_path / "hf/mg2hg", source)


def test_config_json_of_another_model_is_refused(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    convert(models["llama", False], tmp_path / "mg", to="mg")
    config = json.loads((tmp_path / "mg/hf/config.json").read_text())
    (tmp_path / "mg/hf/config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(UserError, match="says ffn_hidden_size 256, the weights have 128"):
        convert(tmp_path / "mg", tmp_path / "hf", to="hf")


def test_a_dry_run_prints_the_plan_and_writes_nothing(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", models["llama", False])
    said = convert(models["llama", False], tmp_path / "mg", to="mg", dry_run=True, lora_load=str(adapter), **TP2_PP2,
                   num_layer_list="3,2")  # fmt: skip
    assert "decoder.layers.*.mlp.linear_fc1.weight" in said and "+ rank 4" in said and "layers per stage 3,2" in said
    assert not (tmp_path / "mg").exists()


@pytest.mark.parametrize("fields, words", [
    ({"target_tensor_parallel_size": 4}, "4 does not divide the 2 query groups"),
    ({"target_pipeline_parallel_size": 2}, "--num-layer-list 3,2"),
    ({"model_type_hf": "qwen2"}, "--model-type-hf qwen2 contradicts"),
    ({"add_qkv_bias": True}, "--add-qkv-bias contradicts"),
    ({"lora_flags": {"r": 8}}, "without --lora-load"),
])  # fmt: skip
def test_flags_that_do_not_fit(
    models: dict[tuple[str, bool], Path], tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        convert(models["llama", False], tmp_path / "mg", to="mg", **fields)
    assert not (tmp_path / "mg").exists()


def test_a_checkpoint_is_never_written_over_its_source(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    convert(models["llama", False], tmp_path / "mg", to="mg")
    with pytest.raises(UserError, match="is also --load-dir"):
        convert(tmp_path / "mg", tmp_path / "mg", to="mg")


def test_spelling_is_detected_and_contradictions_are_said(models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    convert(models["llama", False], tmp_path / "mcore", to="mg", **MCORE)
    assert "holds mcore names" in convert(tmp_path / "mcore", tmp_path / "again", to="mg")
    assert open_rank_files(tmp_path / "again").spelling == "mcore"
    with pytest.raises(UserError, match="--load-from-legacy contradicts"):
        convert(tmp_path / "mcore", tmp_path / "x", to="mg", load_from_legacy=True, use_mcore_models=True)
    convert(models["llama", False], tmp_path / "legacy", to="mg")
    assert open_rank_files(tmp_path / "legacy").spelling == "legacy"
    assert "holds legacy names" in convert(tmp_path / "legacy", tmp_path / "y", to="mg", **MCORE)
