"""Two sets of weights in one folder: taken where they are the same, refused where they differ, index files checked.

Seen in public as huggingface/diffusers #14769: an older file beside the newer one is loaded without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.config.errors import UserError
from tests.helpers.made_model import Dimensions, made_model, made_sharded_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SIZE = Dimensions(vocab=67)
HEAD = "lm_head.weight"


def single(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def test_an_old_index_beside_a_newer_file_is_refused(tmp_path: Path) -> None:
    made_sharded_model(tmp_path, SIZE, tensors_a_file=9, seed=1)
    made_model(tmp_path, SIZE, seed=2)
    with pytest.raises(UserError, match=r"two sets of weights that differ: model-00001-of-\d+.safetensors.* remove"):
        HfModel(tmp_path)


def test_one_value_that_differs_is_enough(tmp_path: Path) -> None:
    tensors = single(made_model(tmp_path, SIZE))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert HfModel(tmp_path).dropped["pytorch_model.bin"] == "the weights are read from model.safetensors"
    tensors[HEAD] = tensors[HEAD].clone()
    tensors[HEAD][33, 3] += 1
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model.bin, beside the files that are read, has another {HEAD}"):
        HfModel(tmp_path)


def test_the_same_weights_in_an_index_and_a_file_are_taken(tmp_path: Path) -> None:
    made_sharded_model(tmp_path, SIZE, tensors_a_file=9)
    tensors = {n: t for file in tmp_path.glob("model-*") for n, t in load_file(file).items()}
    save_file(tensors, tmp_path / SINGLE)
    model = HfModel(tmp_path)
    assert torch.equal(model.read("output_layer.weight"), tensors[HEAD])
    assert "model-00001-of-00003.safetensors" in model.dropped


def test_left_over_shards_of_another_number_are_compared(tmp_path: Path) -> None:
    made_sharded_model(tmp_path, SIZE, tensors_a_file=20)
    old = tmp_path / "model-00002-of-00009.safetensors"
    save_file({HEAD: torch.zeros(67, SIZE.hidden)}, old)
    with pytest.raises(UserError, match=rf"{old.name}, beside .* has another {HEAD}: remove {old.name}"):
        HfModel(tmp_path)
    save_file({"model.layers.7.mlp.up_proj.weight": torch.zeros(4, 4)}, old)
    with pytest.raises(UserError, match=r"has model.layers.7.mlp.up_proj.weight, which they lack"):
        HfModel(tmp_path)


def test_a_copy_of_the_tied_embedding_in_one_of_them_is_no_difference(tmp_path: Path) -> None:
    tensors = single(made_model(tmp_path, Dimensions(vocab=67, tied=True)))
    torch.save({**tensors, HEAD: tensors["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    HfModel(tmp_path)


def test_files_that_no_loader_takes_are_only_named(tmp_path: Path) -> None:
    tensors = single(made_model(tmp_path, SIZE))
    half = {name: tensor.half() for name, tensor in tensors.items()}
    for name in ("model.fp16.safetensors", "consolidated.safetensors"):
        save_file(half, tmp_path / name)
    assert {"model.fp16.safetensors", "consolidated.safetensors"} <= HfModel(tmp_path).dropped.keys()


@pytest.mark.parametrize("index, words", [
    ([], "expected object"), ({}, "lacks weight_map"), ({"weight_map": {}}, "weight_map is empty"),
    ({"weight_map": ["a"]}, "weight_map: expected object"), ({"weight_map": {"a": 1}}, "expected str, got int"),
    ({"weight_map": {"a": None}}, "expected str"),
    ({"weight_map": {"a": "../x.safetensors"}}, "not the name of a file"),
    ({"weight_map": {"a": "/etc/passwd"}}, "not the name of a file"), ({"weight_map": {"a": "b\0"}}, "not the name"),
    ({"weight_map": {"a": "x" * 300}}, "not the name of a file"), ({"weight_map": {"a": ".."}}, "not the name"),
    ({"weight_map": {"a": "b.safetensors"}}, "which the folder lacks"), ({"weight_map": {"a": ""}}, "not the name"),
    ({"weight_map": {"a": "\ud800"}}, "half of a surrogate pair"), ({"weight_map": {"a": "config.json"}}, "damaged"),
])  # fmt: skip
def test_an_index_that_is_damaged_is_refused_in_one_line(index: Any, words: str, tmp_path: Path) -> None:
    made_model(tmp_path, SIZE)
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=words) as error:
        HfModel(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_index_that_names_a_part_of_the_tensors_is_refused(tmp_path: Path) -> None:
    made_sharded_model(tmp_path, SIZE, tensors_a_file=9)
    index = json.loads((tmp_path / INDEX).read_text())
    kept = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file == kept}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"which they lack|lacks \d+ tensors"):
        HfModel(tmp_path)
