"""Folding an adapter into its base: independent of layout, refused on the wrong base or hyper-parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.config.errors import UserError
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.foreign import make_foreign
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face model, adapter)."""
    folder = tmp_path_factory.mktemp("merge")
    hf = tiny_model("qwen2", folder / "hf", dtype=request.param)
    return hf, random_adapter(folder / "adapter", hf)


def merged_through(model: tuple[Path, Path], folder: Path, **layout: Any) -> dict[str, torch.Tensor]:
    hf, adapter = model
    convert(hf, folder / "base", to="mg", **layout)
    convert(folder / "base", folder / "out", to="hf", lora_load=str(adapter))
    return hf_tensors(folder / "out/mg2hg")


def test_the_merged_model_is_the_same_bits_through_every_layout(model: tuple[Path, Path], tmp_path: Path) -> None:
    expected = merged_through(model, tmp_path / "0")
    layouts: list[dict[str, Any]] = [
        {"use_mcore_models": True, "target_tensor_parallel_size": 2},
        {"target_pipeline_parallel_size": 2, "make_vocab_size_divisible_by": 64},
    ]
    for number, layout in enumerate(layouts, 1):
        found = merged_through(model, tmp_path / str(number), **layout)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    convert(tmp_path / "1/base", tmp_path / "mg", to="mg", lora_load=str(model[1]), target_tensor_parallel_size=2)
    convert(tmp_path / "mg", tmp_path / "hf", to="hf")
    found = hf_tensors(tmp_path / "hf/mg2hg")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_exactly_the_adapted_weights_change(model: tuple[Path, Path], tmp_path: Path) -> None:
    hf, _ = model
    adapter = random_adapter(tmp_path / "adapter", hf, targets=("linear_qkv", "linear_fc2"))
    before, after = hf_tensors(hf), merged_through((hf, adapter), tmp_path)
    adapted = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "down_proj.weight")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(adapted)}


def test_an_adapter_of_another_base_is_refused(model: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = model
    other = tiny_model("qwen2", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="trained on another base"):
        convert(other, tmp_path / "out", to="mg", lora_load=str(adapter))
    small = tiny_model("qwen2", tmp_path / "small", intermediate_size=64)
    with pytest.raises(UserError, match=r"the base's weight is \[128, 64\]: the adapter belongs to another model"):
        convert(small, tmp_path / "out", to="mg", lora_load=str(adapter))


def test_an_adapter_that_does_not_know_its_base_is_a_warning(model: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", model[0], fingerprint=None)
    said = convert(model[0], tmp_path / "out", to="mg", lora_load=str(adapter))
    assert "warning: " in said and "does not say which base" in said


@pytest.mark.parametrize("flags, words", [
    ({"r": 8}, "--lora-r 8 contradicts the adapter .* trained with 4"),
    ({"alpha": 32.0}, "--lora-alpha 32 contradicts the adapter .* trained with 8"),
    ({"target_modules": ("query_key_value",)}, "--lora-target-modules linear_qkv contradicts"),
])  # fmt: skip
def test_flags_that_contradict_the_adapter_are_refused(
    model: tuple[Path, Path], tmp_path: Path, flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        convert(model[0], tmp_path / "out", to="mg", lora_load=str(model[1]), lora_flags=flags)


def test_legacy_names_of_the_same_targets_agree(model: tuple[Path, Path], tmp_path: Path) -> None:
    targets = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    flags = {"r": 4, "alpha": 8.0, "target_modules": targets}
    said = convert(model[0], tmp_path / "out", to="mg", lora_load=str(model[1]), lora_flags=flags)
    assert "into 8 linears; largest change of a weight" in said


def test_a_merge_that_leaves_the_range_of_fp16_names_the_tensor(model: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", model[0], alpha=1e7)
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.self_attention\.linear_qkv\.weight: .* does not fit"):
        convert(model[0], tmp_path / "out", to="mg", lora_load=str(adapter), params_dtype="fp16")


@pytest.mark.parametrize("tp, pp, vpp", [(2, 1, 1), (2, 2, 2)])
def test_base_and_adapter_need_not_have_one_layout(tp: int, pp: int, vpp: int, tmp_path: Path) -> None:
    foreign = make_foreign(tmp_path)
    hf = tmp_path / "whole"
    convert(foreign.mg, hf, to="hf", lora_load=str(foreign.own))
    ranks = foreign.modellink(tmp_path / "ranks", tp=tp, pp=pp, vpp=vpp, legacy=True)
    convert(foreign.mg, tmp_path / "base", to="mg", target_pipeline_parallel_size=2,
            num_layers_per_virtual_pipeline_stage=1, use_mcore_models=True)  # fmt: skip
    convert(tmp_path / "base", tmp_path / "out", to="hf", lora_load=str(ranks))
    found, expected = hf_tensors(tmp_path / "out/mg2hg"), hf_tensors(hf / "mg2hg")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_report_tells_what_each_weight_became(model: tuple[Path, Path], tmp_path: Path) -> None:
    convert(model[0], tmp_path / "out", to="hf", lora_load=str(model[1]))
    report = json.loads((tmp_path / "out/merge_report.json").read_text())["weights"]
    before, after = hf_tensors(model[0]), hf_tensors(tmp_path / "out/mg2hg")
    name = "model.layers.1.mlp.down_proj.weight"
    row = report["decoder.layers.1.mlp.linear_fc2.weight"]
    change = (after[name].double() - before[name].double()).abs().max().item()
    assert len(report) == 8 and row["max_change"] == pytest.approx(change, rel=0.02)
    assert 0 < row["rounding_over_update"] < 0.02 and row["max_rounding"] <= 2.0**-8 * after[name].abs().max()


def test_a_merge_into_a_sharded_checkpoint_is_reported_once(model: tuple[Path, Path], tmp_path: Path) -> None:
    for tp in (1, 2):
        convert(model[0], tmp_path / str(tp), to="mg", lora_load=str(model[1]), target_tensor_parallel_size=tp,
                verify=True)  # fmt: skip
    one, two = (json.loads((tmp_path / f"{tp}/merge_report.json").read_text())["weights"] for tp in (1, 2))
    assert one.keys() == two.keys() and all(one[name] == pytest.approx(two[name]) for name in one)
