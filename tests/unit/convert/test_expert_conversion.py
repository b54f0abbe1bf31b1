"""Mixtures of experts converted: the same bits from transformers and back, at any expert parallel size; adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.cli.convert import main
from modellink_lora.config.diff import DiffConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert import verify
from modellink_lora.convert.diff import diff
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.made_model import Dimensions, made_model
from tests.helpers.tiny import MOE_FAMILIES, tiny_model

EP2: dict[str, Any] = {"use_mcore_models": True, "target_expert_parallel_size": 2}
ALL2 = {**EP2, "target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
MIXTRAL = Dimensions(family="mixtral", experts=4)


def same(found: Path, expected: Path) -> bool:
    a, b = hf_tensors(found), hf_tensors(expected)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_what_transformers_saves_comes_back_and_loads(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model(family, tmp_path / "source")
    told = convert(source, tmp_path / "mg", to="mg", verify=True, **ALL2)
    assert "EP 2" in told and "verified" in told
    files = open_rank_files(tmp_path / "mg")
    assert (files.tp, files.partition.stages, files.ep) == (2, 2, 2)
    convert(tmp_path / "mg", tmp_path / "hf", to="hf", verify=True)
    assert same(tmp_path / "hf/mg2hg", source)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "hf/mg2hg", source)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_expert_folder_holds_its_experts_and_all_else(tmp_path: Path) -> None:
    told = convert(made_model(tmp_path / "hf", MIXTRAL), tmp_path / "mg", to="mg", dry_run=True, list_moves=True, **EP2)
    assert "mp_rank_00_001/decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight" in told
    assert not (tmp_path / "mg").exists()
    convert(tmp_path / "hf", tmp_path / "mg", to="mg", **EP2)
    for expert in range(2):
        file = tmp_path / f"mg/iter_0000001/mp_rank_00_{expert:03d}/model_optim_rng.pt"
        document = torch.load(file, weights_only=False)
        held = {name for name in document["model"] if "layers.0.mlp" in name}
        assert held == {"decoder.layers.0.mlp.router.weight"} | {
            f"decoder.layers.0.mlp.experts.local_experts.{number}.linear_fc{linear}.weight"
            for number in range(2) for linear in (1, 2)
        }  # fmt: skip
        assert (document["args"].num_experts, document["args"].expert_model_parallel_size) == (4, 2)


def test_a_byte_that_changed_in_a_copy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "decoder.layers.0.self_attention.linear_proj.weight"

    def damage(folder: Path) -> None:
        path = folder / "mp_rank_00_001/model_optim_rng.pt"
        weight = torch.load(path, weights_only=False)["model"][name]
        data = bytearray(path.read_bytes())
        data[data.find(weight.numpy().tobytes()) + weight.nbytes // 2] ^= 1  # a row that opening does not look at
        path.write_bytes(data)

    monkeypatch.setattr(verify, "_forget", damage)
    with pytest.raises(UserError, match=r"mp_rank_00_001.*damaged: \S+ has not the CRC-32"):
        convert(made_model(tmp_path / "hf", MIXTRAL), tmp_path / "mg", to="mg", verify=True, **EP2)
    assert not (tmp_path / "mg").exists()


@pytest.mark.parametrize("flag", ["--target-expert-parallel-size", "--target-expert-model-parallel-size"])
def test_both_spellings_of_the_flag_are_known(flag: str, tmp_path: Path) -> None:
    words = ["--load-model-type", "hf", "--load-dir", made_model(tmp_path / "hf", MIXTRAL), "--save-dir",
             tmp_path / "mg", "--use-mcore-models", "--model-type-hf", "mixtral", flag, 4]  # fmt: skip
    main([str(word) for word in words])
    assert open_rank_files(tmp_path / "mg").ep == 4


def test_a_torch_dist_folder_of_experts_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    stacked = {"decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.zeros(2, 4, 8, 6)}
    dcp.save(stacked, checkpoint_id=tmp_path / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(UserError, match="holds a mixture of experts in a torch_dist folder, which is not read"):
        convert(tmp_path, tmp_path / "out", to="hf")


def test_layouts_of_one_model_do_not_differ_and_other_experts_do(tmp_path: Path) -> None:
    source = made_model(tmp_path / "hf", MIXTRAL)
    convert(source, tmp_path / "a", to="mg", **EP2)
    convert(source, tmp_path / "b", to="mg", **{**ALL2, "target_expert_parallel_size": 4})
    convert(made_model(tmp_path / "other", MIXTRAL, seed=1), tmp_path / "c", to="mg", **EP2)
    said: list[str] = []
    assert diff(tmp_path / "a", tmp_path / "b", DiffConfig(), say=said.append) == 0
    assert "EP 4" in said[1]
    assert diff(tmp_path / "a", tmp_path / "c", DiffConfig(), say=said.append) > 16


def test_a_target_left_out_with_the_older_spelling_is_the_sources(tmp_path: Path) -> None:
    from modellink_lora.config.convert import ConvertConfig
    from modellink_lora.convert.execute import run

    convert(made_model(tmp_path / "hf", MIXTRAL), tmp_path / "a", to="mg", **EP2)
    run(ConvertConfig(load_dir=str(tmp_path / "a"), save_dir=str(tmp_path / "b"), loader="megatron", saver="megatron"),
        {}, say=lambda line: None)  # fmt: skip
    assert open_rank_files(tmp_path / "b").ep == 2


@pytest.mark.parametrize("fields, words", [
    ({}, "a mixture of experts has no legacy names: give --use-mcore-models"),
    ({"save_to_legacy": True}, "has no legacy names"),
    ({"use_mcore_models": True, "target_expert_parallel_size": 3}, "size 3 does not divide the 4 experts"),
    ({"use_mcore_models": True, "target_tensor_parallel_size": 2}, "does not divide the 13 rows of an expert"),
])  # fmt: skip
def test_layouts_that_do_not_divide_and_legacy_names_are_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    odd = Dimensions(family="mixtral", experts=4, ffn=13)
    with pytest.raises(UserError, match=words):
        convert(made_model(tmp_path / "hf", odd), tmp_path / "mg", to="mg", **fields)


def test_a_dense_model_has_no_experts_to_deal_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this model has no experts"):
        convert(made_model(tmp_path / "hf", Dimensions()), tmp_path / "mg", to="mg", **EP2)


@pytest.mark.parametrize(
    "targets", [("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")], ids=["attention", "experts"]
)
def test_an_adapter_is_merged_into_every_copy_and_every_expert(targets: tuple[str, ...], tmp_path: Path) -> None:
    source = made_model(tmp_path / "hf", MIXTRAL)
    adapter = random_adapter(tmp_path / "lora", source, targets=targets)
    convert(source, tmp_path / "whole", to="hf", lora_load=str(adapter))
    convert(source, tmp_path / "mg", to="mg", **EP2)
    convert(tmp_path / "mg", tmp_path / "merged", to="mg", lora_load=str(adapter), verify=True, **ALL2)
    convert(tmp_path / "merged", tmp_path / "out", to="hf")
    assert same(tmp_path / "out/mg2hg", tmp_path / "whole/mg2hg")
    changed, before = hf_tensors(tmp_path / "out/mg2hg"), hf_tensors(source)
    differing = {name for name in before if not torch.equal(before[name], changed[name])}
    kinds = ("self_attn",) if "linear_qkv" in targets else (".w1", ".w2", ".w3")
    assert differing == {name for name in before if any(kind in name for kind in kinds)}


def test_an_adapter_of_experts_comes_from_peft_and_goes_back(tmp_path: Path) -> None:
    source = made_model(tmp_path / "hf", MIXTRAL)
    adapter = random_adapter(tmp_path / "lora", source, targets=("linear_fc1", "linear_fc2"))
    convert(source, tmp_path / "peft", to="peft", lora_load=str(adapter))
    (peft,) = (path.parent for path in (tmp_path / "peft").rglob("adapter_config.json"))
    convert(source, tmp_path / "a", to="hf", lora_load=str(adapter))
    convert(source, tmp_path / "b", to="hf", lora_load=str(peft))
    assert same(tmp_path / "a/mg2hg", tmp_path / "b/mg2hg") and not same(tmp_path / "a/mg2hg", source)
