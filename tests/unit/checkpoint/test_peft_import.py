"""Folders of the PEFT library that our adapters can and cannot express; tests/parity has the arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.adapter import check_flags, check_resumable
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.hf import HfModel
from modellink_lora.checkpoint.peft import write_peft
from modellink_lora.config.errors import UserError
from tests.helpers.conversion import TARGETS, random_adapter
from tests.helpers.tiny import tiny_model

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("peft") / "hf")


@pytest.fixture
def folder(hf: Path, tmp_path: Path) -> Path:
    write_peft(tmp_path / "peft", open_adapter(random_adapter(tmp_path / "own", hf)), base_model=None)
    return tmp_path / "peft"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("lora", [
    {}, {"use_rslora": True}, {"targets": ("linear_qkv", "linear_fc2")},
    {"rank_pattern": {"linear_proj": 7, "decoder.layers.1.mlp.linear_fc1": 2}, "alpha_pattern": {"linear_qkv": 0.1}},
], ids=["all", "rslora", "two targets", "patterns"])  # fmt: skip
def test_what_we_export_comes_back_bit_for_bit(lora: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    own = open_adapter(random_adapter(tmp_path / "own", hf, **lora))
    write_peft(tmp_path / "peft", own, base_model=None)
    back = open_adapter(tmp_path / "peft", base=lambda: HfModel(hf).config)
    assert back.shapes == own.shapes and not back.notes
    assert all(torch.equal(back.read(name), own.read(name)) for name in own.shapes)
    for module in own.modules:
        assert back.meta.lora.scaling_of(module) == own.meta.lora.scaling_of(module)
        assert back.meta.lora.rank_of(module) == own.meta.lora.rank_of(module)
    check_flags(back, {"r": 4, "alpha": 8.0, "target_modules": lora.get("targets", TARGETS)})
    with pytest.raises(UserError, match="adapter of PEFT, whose optimizer state is not read"):
        check_resumable(back)


@pytest.mark.parametrize("changes, words", [
    ({"use_dora": True}, "use_dora true is not supported"),
    ({"modules_to_save": ["lm_head"]}, r'modules_to_save "lm_head" is not supported: its weights are not there'),
    ({"lora_bias": True}, "lora_bias true is not supported"),
    ({"bias": "all"}, 'bias "all" is not supported'),
    ({"fan_in_fan_out": True}, "fan_in_fan_out true is not supported"),
    ({"layer_replication": [[0, 2]]}, "layer_replication .* is not supported"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices .* is not supported"),
    ({"something_of_next_year": 1}, "something_of_next_year 1 is not supported"),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" is not supported'),
    ({"task_type": "SEQ_CLS"}, 'task_type "SEQ_CLS" is not supported'),
    ({"peft_type": "IA3"}, "peft_type IA3 is not supported"),
    ({"r": 5}, r"down_proj has lora_A \(4, 128\) and lora_B \(64, 4\); .* says rank 5"),
    ({"lora_alpha": "8"}, "lora_alpha: expected float, got str"),
    ({"alpha_pattern": {"q_proj": -1}}, "q_proj -1: alpha must be a number above 0"),
])  # fmt: skip
def test_settings_that_our_adapters_cannot_express_are_refused_by_name(
    changes: dict[str, Any], words: str, folder: Path, hf: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=words) as error:
        open_adapter(folder, base=lambda: HfModel(hf).config)
    assert "\n" not in str(error.value)


def replaced(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Adds a tensor of that name."""
    return lambda tensors: tensors.update({name: torch.zeros(4, 64)})


@pytest.mark.parametrize("change, words", [
    (replaced("base_model.model.lm_head.lora_A.weight"), "adapts lm_head, which is not among the linears"),
    (replaced("base_model.model.lm_head.weight"), r"lm_head\.weight is \(4, 64\), the base's \(259, 64\)"),
    (replaced(Q.replace("lora_A.", "")), "modules_to_save is not supported"),
    (replaced("base_model.model.model.embed_tokens.lora_embedding_A"), "an adapter on embed_tokens is not supported"),
    (replaced(Q.replace(".weight", ".bias").replace("_A", "_B")), "lora_bias is not supported"),
    (replaced(Q.replace("lora_A.weight", "lora_magnitude_vector")), "use_dora is not supported"),
    (replaced(Q.replace("layers.0", "layers.2")), "adapts model.layers.2.self_attn.q_proj, which is not among"),
    (lambda tensors: tensors.pop(Q.replace("_A", "_B")), r"q_proj has only one factor: lora_B is missing"),
    (lambda tensors: tensors.update({Q: torch.zeros(4, 64, dtype=torch.float64)}), "holds tensors of dtype F64"),
    (lambda tensors: tensors.clear(), "holds no LoRA factors"),
])  # fmt: skip
def test_tensors_that_have_no_place_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], Any], words: str, folder: Path, hf: Path
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=words) as error:
        open_adapter(folder, base=lambda: HfModel(hf).config)
    assert "\n" not in str(error.value)


def test_folders_that_are_torn_or_mixed_up_are_refused(folder: Path, hf: Path) -> None:
    with pytest.raises(UserError, match="does not tell the dimensions of its model: give the base too"):
        open_adapter(folder)
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="damaged or cut short"):
        open_adapter(folder, base=lambda: HfModel(hf).config)
    tensors.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin: damaged"):
        open_adapter(folder, base=lambda: HfModel(hf).config)
    (folder / "adapter_model.bin").rename(tensors)
    tensors.write_bytes(whole)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match=r"of PEFT and latest_checkpointed_iteration\.txt as well"):
        open_adapter(folder, base=lambda: HfModel(hf).config)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_config\.json, so rank and alpha"):
        open_adapter(folder, base=lambda: HfModel(hf).config)


def test_an_adapter_of_16_bits_keeps_its_dtype_and_one_of_32_bits_too(folder: Path, hf: Path) -> None:
    edit_config(folder, alpha_pattern={"k_proj": 24.0})  # folded in: fp32 for that linear alone
    edit_tensors(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    adapter = open_adapter(folder, base=lambda: HfModel(hf).config)
    dtypes = {name.split(".", 3)[3]: adapter.read(name).dtype for name in adapter.shapes if ".0." in name}
    assert dtypes.pop("self_attention.linear_qkv.lora_B") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16} and adapter.meta.lora.dtype == "fp32"
    edit_config(folder, alpha_pattern={})
    assert open_adapter(folder, base=lambda: HfModel(hf).config).meta.lora.dtype is None
