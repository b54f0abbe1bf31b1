"""The families with names and arrangements of their own: the same bits back, and known without being named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modellink_lora.checkpoint import megatron_args
from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert, hf_tensors
from tests.helpers.reference_models import KINDS, reference_model
from tests.helpers.tiny import tiny_model

TP2_PP2: dict[str, Any] = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}


def same(found: Path, expected: Path) -> bool:
    a, b = hf_tensors(found), hf_tensors(expected)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("spelling", ["use_mcore_models", "save_to_legacy"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "baichuan2-7b"])  # the large vocabulary
def test_there_and_back_is_the_same_bits(name: str, spelling: str, tmp_path: Path) -> None:
    source = reference_model(name, tmp_path / "source")
    convert(source, tmp_path / "mg", to="mg", **TP2_PP2, **{spelling: True})
    convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    assert same(tmp_path / "hf/mg2hg", source)


def test_bloom_is_read_without_the_prefix_that_its_first_files_leave_out(tmp_path: Path) -> None:
    source = tiny_model("bloom", tmp_path / "source", tied=True)
    short = {name.removeprefix("transformer."): tensor for name, tensor in hf_tensors(source).items()}
    (tmp_path / "short").mkdir()
    save_file(short, tmp_path / "short/model.safetensors")
    (tmp_path / "short/config.json").write_bytes((source / "config.json").read_bytes())
    full, without = HfModel(source), HfModel(tmp_path / "short")
    assert all(torch.equal(full.read(name), without.read(name)) for name in full.names())


def as_of_another_program(config: Any, **given: Any) -> Any:
    """args as ModelLink's converter writes them: sizes and switches, no model type."""
    namespace = NAMESPACE(config, **given)
    for name in (megatron_args.COMPLETE, "hf_model_type", "gelu_tanh", "add_rmsnorm_offset", "input_embeds_norm",
                 "rotary_interleaved", "use_glm_rope", "scale_emb", "scale_depth", "dim_model_base", "normalize_head",
                 "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):  # fmt: skip
        if hasattr(namespace, name):
            delattr(namespace, name)
    return namespace


NAMESPACE = megatron_args.namespace


@pytest.mark.parametrize("family, guessed", [
    ("bloom", "bloom"), ("gemma2", "gemma2"), ("glm4", "glm4"), ("qwen3", "qwen3"), ("glm", "qwen2"),
])  # fmt: skip
def test_the_family_of_a_foreign_checkpoint_is_told_by_its_tensors(
    family: str, guessed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_args, "namespace", as_of_another_program)
    convert(tiny_model(family, tmp_path / "hf"), tmp_path / "mg", to="mg", use_mcore_models=True)
    assert open_rank_files(tmp_path / "mg").config.hf_model_type == guessed


def test_a_foreign_checkpoint_becomes_the_model_of_its_config_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = reference_model("minicpm", tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(megatron_args, "namespace", as_of_another_program)
        convert(source, tmp_path / "mg", to="mg", use_mcore_models=True)
    assert open_rank_files(tmp_path / "mg").config.scale_emb == 1.0, "its args do not say"
    convert(tmp_path / "mg", tmp_path / "again", to="mg")
    config = open_rank_files(tmp_path / "again").config
    assert (config.hf_model_type, config.scale_emb, config.dim_model_base) == ("minicpm", 12.0, 16)


def test_a_foreign_checkpoint_without_config_json_is_of_the_family_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(megatron_args, "namespace", as_of_another_program)
        convert(reference_model("baichuan-7b", tmp_path / "hf"), tmp_path / "mg", to="mg", use_mcore_models=True)
    (tmp_path / "mg/hf/config.json").unlink()
    convert(tmp_path / "mg", tmp_path / "named", to="mg", model_type_hf="baichuan")
    assert open_rank_files(tmp_path / "named").config.hf_model_type == "baichuan"
    with pytest.raises(UserError, match="--model-type-hf bloom contradicts"):
        convert(tmp_path / "mg", tmp_path / "x", to="mg", model_type_hf="bloom")


@pytest.mark.parametrize("name", ["add_dense_bias", "embed_layernorm", "post_norm"])
def test_flags_about_tensors_are_compared_with_the_checkpoint(name: str, tmp_path: Path) -> None:
    llama = tiny_model("llama", tmp_path / "hf")
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} contradicts"):
        convert(llama, tmp_path / "mg", to="mg", **{name: True})
    owner = "gemma2" if name == "post_norm" else "bloom"
    convert(tiny_model(owner, tmp_path / "owner"), tmp_path / "mg", to="mg", dry_run=True, **{name: True})
