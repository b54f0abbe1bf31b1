"""Hugging Face folders: every tensor accounted for, damage reported, shards with an index written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.filling import Job
from modellink_lora.checkpoint.hf import INDEX, HfFolder, HfModel, Write, write_hf_folder
from modellink_lora.checkpoint.outfile import Slot
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import hf_tensors
from tests.helpers.tiny import tiny_model


def write(folder: Path, tensors: dict[str, torch.Tensor], *, also: tuple[str, ...] = (), **rest: Any) -> None:
    """Write a folder of these tensors; names in `also` are announced and never written."""
    slots = [Slot(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    slots += [Slot(name, (1,), torch.float32) for name in also]
    config = rest.pop("config", {"model_type": "llama"})

    def jobs(write: Write) -> list[Job]:
        return [Job(lambda tick, name=name: write(name, [tensors[name]])) for name in tensors]

    write_hf_folder(folder, slots, jobs, config=config, **rest)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add (or with None remove) tensors of a one-file model."""
    tensors = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_truncated_file_is_a_message(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged, cut short"):
        HfModel(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    rewrite(folder, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*model.layers.1.mlp.up_proj.weight"):
        HfModel(folder)


def test_a_tensor_the_model_type_does_not_have_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    rewrite(folder, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(UserError, match=r"does not have: model.layers.0.self_attn.q_proj.bias"):
        HfModel(folder)


def test_rotary_buffers_are_no_tensors(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert "inv_freq" not in " ".join(HfFolder(folder).names())
    HfModel(folder)


def test_a_wrong_shape_names_both_shapes(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    rewrite(folder, {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 100)})
    with pytest.raises(UserError, match=r"\(64, 100\).*\(64, 128\)"):
        HfModel(folder).read("decoder.layers.0.mlp.linear_fc2.weight")


def test_a_tied_model_may_repeat_its_head_but_not_another(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, tied=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, {"lm_head.weight": embedding.clone()})
    assert "output_layer.weight" not in HfModel(folder).names()
    rewrite(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"tie_word_embeddings true, but lm_head.weight differs"):
        HfModel(folder)


def test_the_dtype_is_that_of_the_tensors_whatever_config_says(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = HfModel(folder)
    assert (model.dtype, model.config.params_dtype) == (torch.bfloat16, "bf16")


def test_shards_and_bin_files_read_like_one_file(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "one")
    expected = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    write(tmp_path / "many", expected, config=config, companions=folder, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
    found = hf_tensors(tmp_path / "many")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    torch.save(expected, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for path in (folder, tmp_path / "many"):
        read = HfFolder(path)
        assert set(read.names()) == set(expected)
        assert all(torch.equal(read.read(n), expected[n]) for n in expected)


def test_a_shard_the_index_names_but_the_folder_lacks(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "one")
    tensors = load_file(folder / "model.safetensors")
    write(tmp_path / "many", tensors, max_shard_bytes=50_000)
    next((tmp_path / "many").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-.*which the folder lacks"):
        HfFolder(tmp_path / "many")


def test_a_tensor_never_written_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(AssertionError, match=r"never written: \['b'\]"):
        write(tmp_path / "out", {"a": torch.zeros(2)}, also=("b",))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("files, words", [([], "no config.json"), (["config.json"], "holds no model.safetensors")])
def test_a_folder_that_is_no_model(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        HfFolder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        HfFolder(tmp_path / "absent")
