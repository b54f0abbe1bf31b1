"""Megatron rank files: any layout in, full tensors out; files of other programs; damage and contradictions."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.rank_files import FILE, open_rank_files
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert
from tests.helpers.tiny import tiny_model

LAYOUT = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("hf"), tied=True)


@pytest.fixture
def root(hf: Path, tmp_path: Path) -> Path:
    convert(hf, tmp_path / "mg", to="mg", use_mcore_models=True, **LAYOUT)
    return tmp_path / "mg"


def edit(root: Path, change: Callable[[dict[str, Any]], None], rank: str = "mp_rank_*") -> None:
    """Change the documents of the rank files that match."""
    for file in root.glob(f"iter_*/{rank}/{FILE}"):
        document = torch.load(file, weights_only=False)
        change(document)
        torch.save(document, file)


def as_modellink(document: dict[str, Any]) -> None:
    """Reduce args to what ModelLink's converter stores, with its parser's defaults for what it does not read."""
    kept = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings",
            "norm_epsilon", "normalization", "swiglu", "position_embedding_type", "padded_vocab_size",
            "untie_embeddings_and_output_weights", "tensor_model_parallel_size",
            "pipeline_model_parallel_size", "params_dtype")  # fmt: skip
    args = {name: getattr(document["args"], name) for name in kept}
    document["args"] = argparse.Namespace(
        **args, rotary_base=None, num_query_groups=1, group_query_attention=False, vocab_size=None, kv_channels=None,
        make_vocab_size_divisible_by=1, rotary_percent=1.0, rope_scaling_type=None, rope_scaling_factor=1.0,
    )  # fmt: skip


def test_shards_come_directly_or_through_the_full_tensor(root: Path, hf: Path) -> None:
    files, model = open_rank_files(root), HfModel(hf)
    assert (files.tp, files.partition.counts, files.spelling, files.iteration) == (2, (1, 1), "mcore", 1)
    for name in files.names():
        spec = files.family.tensor(name, files.config)
        full = files.read(name)
        if not name.startswith("embedding"):
            assert torch.equal(full, model.read(name))
        for size in (1, 2):
            for rank in range(size):
                assert torch.equal(files.read_shard(name, rank, size), spec.layout.shard(full, rank, size))


def test_the_last_stage_keeps_a_copy_of_a_tied_embedding(root: Path) -> None:
    last = torch.load(root / "iter_0000001/mp_rank_01_001" / FILE, weights_only=False)["model"]
    first = torch.load(root / "iter_0000001/mp_rank_01_000" / FILE, weights_only=False)["model"]
    assert torch.equal(last["output_layer.weight"], first["embedding.word_embeddings.weight"])
    assert "output_layer.weight" not in open_rank_files(root).names()


def test_a_tied_copy_that_differs_is_an_error(root: Path) -> None:
    edit(root, lambda d: d["model"]["output_layer.weight"].add_(1), "mp_rank_01_001")
    with pytest.raises(UserError, match="tied to the embedding, but the two differ on tensor-parallel rank 1"):
        open_rank_files(root)


def test_files_of_modellink_are_measured_on_their_tensors(root: Path, hf: Path) -> None:
    edit(root, as_modellink)
    edit(root, lambda d: d["model"].update({"decoder.layers.0.mlp.linear_fc1._extra_state": None}))
    files = open_rank_files(root)
    own = HfModel(hf).config
    assert (files.config.num_query_groups, files.config.kv_channels) == (own.num_query_groups, own.kv_channels)
    assert (files.config.vocab_size, files.config.rotary_base) == (files.config.padded_vocab_size, 10000.0)


def test_a_flag_tells_the_rope_that_modellink_did_not_store_but_never_contradicts_ours(root: Path) -> None:
    with pytest.raises(UserError, match=r"--rotary-base 500000.0 contradicts --load .* which says 10000.0"):
        open_rank_files(root, model_flags={"rotary_base": 500000.0})
    edit(root, as_modellink)
    assert open_rank_files(root, model_flags={"rotary_base": 500000.0}).config.rotary_base == 500000.0
    with pytest.raises(UserError, match=r"--ffn-hidden-size 130 contradicts .* which says 128"):
        open_rank_files(root, model_flags={"ffn_hidden_size": 130})


@pytest.mark.parametrize("change, words", [
    (lambda d: d["model"].pop("decoder.layers.0.mlp.linear_fc2.weight"), "linear_fc2.weight"),
    (lambda d: d["model"].update({"decoder.layers.0.mlp.linear_fc2.bias": torch.zeros(3)}), "does not have"),
    (lambda d: d["model"].update({"decoder.layers.0.input_layernorm.weight": torch.zeros(3)}), r"shape \(3,\)"),
    (lambda d: d["model"].update({"decoder.layers.0.mlp.linear_fc1.base_layer.weight": torch.zeros(3)}), "twice"),
    (lambda d: d.update({"model1": d.pop("model")}), "mixed up"),
    (lambda d: d.pop("model"), "holds no model"),
    (lambda d: d.pop("args"), "holds no args"),
    (lambda d: setattr(d["args"], "tensor_model_parallel_size", 4), "args say tensor_model_parallel_size 4"),
    (lambda d: setattr(d["args"], "normalization", "LayerNorm"), "args say normalization LayerNorm, but"),
])  # fmt: skip
def test_a_file_that_is_not_a_whole_supported_model_is_refused(
    root: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    edit(root, change)
    with pytest.raises(UserError, match=words):
        open_rank_files(root)


def test_a_missing_rank_file_is_named(root: Path) -> None:
    shutil.rmtree(root / "iter_0000001/mp_rank_01_000")
    with pytest.raises(UserError, match=r"mp_rank_01_000/model_optim_rng\.pt is missing.*2 x 2"):
        open_rank_files(root)


def test_folders_of_different_layouts_are_refused(root: Path) -> None:
    (root / "iter_0000001/mp_rank_00_000").rename(root / "iter_0000001/mp_rank_00_000_000")
    with pytest.raises(UserError, match="different numbers of parts"):
        open_rank_files(root)


def test_a_failed_write_leaves_the_previous_checkpoint(root: Path, tmp_path: Path) -> None:
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    other = tiny_model("llama", tmp_path / "other", seed=9)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e30)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.final_layernorm\.weight: the value 1e\+30 does not fit"):
        convert(other, root, to="mg", params_dtype="fp16", overwrite=True)
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before
