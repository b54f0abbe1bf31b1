"""Adapters of which a part is missing, foreign or half: one line of their own reason from every reader.

Found by fuzzing: own adapters with missing, foreign or half tensors were merged "into 0 linears". PEFT's `.bin` files,
and names with the adapter's name in them (`lora_A.default.weight`), which `state_dict()` of a live model gives, were
refused for a reason that was not theirs.

Seen in public as huggingface/peft #2118: missing keys of an adapter were loaded without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.peft import write_peft
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.adapters import export_adapter
from tests.helpers.small_adapter import MODEL, write_small

FC2, QKV = "decoder.layers.1.mlp.linear_fc2", "decoder.layers.0.self_attention.linear_qkv"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Any]], Any]


def edit_tensors(path: Path, change: Change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def edit_json(path: Path, change: Change) -> None:
    document = json.loads(path.read_text())
    document.pop("crc32", None)
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An adapter as it was written before there were checksums."""
    folder = write_small(tmp_path / "own")
    edit_json(folder / "adapter.json", lambda document: None)
    return folder


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    write_peft(tmp_path / "peft", open_adapter(write_small(tmp_path / "source")), base_model=None)
    return tmp_path / "peft"


def open_peft(folder: Path) -> Adapter:
    return open_adapter(folder, base=lambda: MODEL)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.clear(), "holds no LoRA factors, its settings name those of linear_qkv linear_fc2"),
    (lambda t: [t.clear(), t.update(foo=torch.zeros(3))], "holds no LoRA factors"),
    (lambda t: [t.pop(n) for n in [*t] if "layers.1." in n], r"lacks decoder\.layers\.1.* and 3 other of the 8"),
    (lambda t: [t.pop(n) for n in [*t] if "linear_fc2" in n], "lacks decoder.layers.0.mlp.linear_fc2"),
    (lambda t: t.pop(f"{FC2}.lora_A"), f"{FC2} has only one factor: lora_B is there, lora_A is missing"),
    (lambda t: t.pop(f"{FC2}.lora_B"), f"{FC2} has only one factor: lora_A is there, lora_B is missing"),
    (lambda t: t.update(foo=torch.zeros(3)), "holds foo, which is no LoRA factor"),
    (lambda t: t.update({f"{QKV}x.lora_A": torch.zeros(2, 16)}), "holds .*qkvx.lora_A, which its settings do not name"),
    (lambda t: t.update({n.replace("layers.1", "layers.2"): x.clone() for n, x in t.items()}), "holds decoder"),
    (lambda t: t.update({f"{FC2}.lora_A": torch.zeros(3, 11)}), r"is \(3, 11\), its settings .* make it \(3, 12\)"),
    (lambda t: t.update({f"{FC2}.lora_A": torch.zeros(2, 12)}), r"is \(2, 12\), its settings .* make it \(3, 12\)"),
    (lambda t: t.update({f"{FC2}.lora_A": torch.zeros(3, 12).double()}), "is torch.float64, expected one of fp32"),
    (lambda t: t.update({f"{FC2}.lora_A": torch.zeros(3, 12).int()}), "is torch.int32, expected one of fp32"),
    (lambda t: t[f"{FC2}.lora_B"].fill_(float("nan")), "holds nan or inf: the run that wrote it diverged"),
    (lambda t: t[f"{FC2}.lora_A"].fill_(float("inf")), "holds nan or inf: the run that wrote it diverged"),
    (lambda t: t.update({"output_layer.weight": torch.zeros(32, 16)}), "holds output_layer.weight, which is no LoRA"),
], ids=range(16))  # fmt: skip
def test_what_the_settings_of_an_own_adapter_name_is_all_there_and_nothing_else(
    change: Change, words: str, own: Path
) -> None:
    edit_tensors(own / "adapter.safetensors", change)
    with pytest.raises(UserError, match=words) as error:
        open_adapter(own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda d: d["lora"].update(target_modules=[]), "its settings name no linear"),
    (lambda d: d["lora"].update(target_modules=["foo"]), "'foo', which is none of"),
    (lambda d: d["lora"].update(target_modules=["linear_qkv"]), "holds .*linear_fc2.* settings do not name"),
    (lambda d: d["lora"].update(r="4"), "lora: r: expected int, got str"),
    (lambda d: d["lora"].update(alpha=None), "lora: alpha: expected float"),
    (lambda d: d["lora"].update(zzz=1), "lora: key 'zzz' is not known here"),
    (lambda d: d["lora"].update(rank_pattern={"foo": 3, "linear_fc2": 3}), "rank_pattern/alpha_pattern foo matches no"),
    (lambda d: d["model"].update(num_layers=3), "lacks decoder.layers.2"),
    (lambda d: d["model"].update(num_layers=10**9), "its settings say 1000000000 layers"),
    (lambda d: d["model"].update(hf_model_type="foo"), "foo"),
    (lambda d: d["model"].update(num_layers="2"), "model: num_layers: expected int, got str"),
    (lambda d: d.update(format=2), "format 2 is not 1"),
    (lambda d: d.update(peft=3), "peft: expected object.*got int"),
    (lambda d: d.update(iteration=-1), "iteration -1 is below 0"),
    (lambda d: d.pop("lora"), "lacks lora"),
], ids=range(15))  # fmt: skip
def test_settings_of_an_own_adapter_that_cannot_be_are_named(change: Change, words: str, own: Path) -> None:
    edit_json(own / "adapter.json", change)
    with pytest.raises(UserError, match=words) as error:
        open_adapter(own)
    assert "\n" not in str(error.value)


def rename(tensors: dict[str, Tensor], change: Callable[[str], str]) -> None:
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


@pytest.mark.parametrize("spelling", [
    lambda name: name.replace(".weight", ".default.weight"),
    lambda name: name.removeprefix("base_model.model."),
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.module.{name}".replace(".weight", ".my-run.weight"),
], ids=["state_dict of a live model", "injected", "DDP", "compiled"])  # fmt: skip
@pytest.mark.parametrize("pickled", [False, True])
def test_other_spellings_and_bin_files_give_the_same_adapter(
    spelling: Callable[[str], str], pickled: bool, peft: Path
) -> None:
    expected = open_peft(peft)
    tensors = {name: expected.read(name) for name in expected.shapes}
    path = peft / "adapter_model.safetensors"
    edit_tensors(path, lambda t: rename(t, spelling))
    if pickled:
        torch.save(load_file(path), peft / "adapter_model.bin")
        path.unlink()
    found = open_peft(peft)
    assert found.shapes == expected.shapes and found.meta == expected.meta
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.clear(), "holds no LoRA factors"),
    (lambda t: t.pop(f"{Q}.lora_A.weight"), "q_proj has only one factor: lora_A is missing"),
    (lambda t: [t.pop(n) for n in [*t] if "layers.1." in n], "lacks the factors of .*layers.1.* and 3 other, which"),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}), "use_dora is not supported"),
    (lambda t: t.update({f"{Q}.lora_A.bias": torch.ones(2)}), "trained biases are not supported"),
    (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(16)}), "lora_bias is not supported"),
    (lambda t: t.update({f"{Q}.bias": torch.ones(16)}), "trained biases are not supported"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 32)}),
     "an adapter on embed_tokens is not supported"),
    (lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(16, 16)}), "the state_dict of a whole model"),
    (lambda t: t.update({f"{Q}.lora_A.default.weight": t[f"{Q}.lora_A.weight"].clone()}), "are the same tensor"),
    (lambda t: t.update({f"{Q}.lora_A.two.weight": t.pop(f"{Q}.lora_A.weight"),
                         f"{Q}.lora_B.two.weight": t.pop(f"{Q}.lora_B.weight")}), "several adapters, .* and two"),
    (lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")), "holds nan or inf"),
], ids=range(12))  # fmt: skip
def test_a_peft_file_is_refused_for_its_own_reason(change: Change, words: str, peft: Path) -> None:
    edit_tensors(peft / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=words) as error:
        open_peft(peft)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    {"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": r".*\.layers\.0\.(self_attn\.[qkv]_proj|mlp\.down_proj)"},
    {"target_modules": "all-linear", "exclude_modules": r".*(layers\.1|o_proj|gate_proj|up_proj).*"},
], ids=["layers_to_transform", "layers_pattern", "regular expression", "all-linear without some"])  # fmt: skip
def test_a_part_that_the_settings_name_is_whole(changes: dict[str, Any], peft: Path) -> None:
    edit_tensors(peft / "adapter_model.safetensors", lambda t: [t.pop(n) for n in [*t] if "layers.1." in n])
    edit_json(peft / "adapter_config.json", lambda d: d.update(changes))
    adapter = open_peft(peft)
    assert not adapter.read("decoder.layers.1.mlp.linear_fc2.lora_B").any()
    assert adapter.read("decoder.layers.0.mlp.linear_fc2.lora_B").any()
    edit_tensors(peft / "adapter_model.safetensors", lambda t: [t.pop(n) for n in [*t] if "q_proj" in n])
    with pytest.raises(UserError, match=r"lacks the factors of model\.layers\.0\.self_attn\.q_proj, which"):
        open_peft(peft)


def test_linears_that_the_settings_do_not_name_are_refused(peft: Path) -> None:
    edit_json(peft / "adapter_config.json", lambda d: d.update(target_modules=["q_proj", "k_proj", "v_proj"]))
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\.mlp\.down_proj, which .* does not name"):
        open_peft(peft)


@pytest.mark.parametrize("changes, words", [
    ({"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]}, "lacks the factors of lm_head"),
    ({"target_modules": "("}, "target_modules '\\(' is no regular expression"),
    ({"rank_pattern": {"(": 3}}, "rank_pattern .* is no regular expression"),
    ({"target_modules": 3}, "target_modules: expected"),
    ({"r": True}, "r: expected int, got bool"), ({"r": 0}, "r 0: a rank is a whole number"),
    ({"r": 10**30}, "r"), ({"lora_alpha": float("inf")}, "lora_alpha inf: alpha must be"),
    ({"lora_alpha": None}, "lora_alpha: expected float"), ({"lora_dropout": 2}, "lora_dropout 2: must be at least 0"),
    ({"use_rslora": "yes"}, "use_rslora: expected bool"), ({"layers_to_transform": "0"}, "layers_to_transform: exp"),
    ({"modules_to_save": "lm_head"}, "modules_to_save: expected"), ({"peft_type": None}, "peft_type None is not"),
    ({"of_next_year": {"a": 1}}, "of_next_year .* is not supported"), ({"init_lora_weights": []}, "init_lora_weights"),
], ids=range(16))  # fmt: skip
def test_settings_of_peft_that_cannot_be_are_named(changes: dict[str, Any], words: str, peft: Path) -> None:
    edit_json(peft / "adapter_config.json", lambda d: d.update(changes))
    with pytest.raises(UserError, match=words) as error:
        open_peft(peft)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_an_untrained_adapter_is_taken_with_a_warning(kind: str, own: Path, peft: Path, tmp_path: Path) -> None:
    file = own / "adapter.safetensors" if kind == "own" else peft / "adapter_model.safetensors"
    edit_tensors(file, lambda t: [x.zero_() for n, x in t.items() if "lora_B" in n])
    adapter = open_peft(file.parent)
    assert [w for w in adapter.warnings if "every lora_B is zero" in w] and adapter.modules
    said: list[str] = []
    convert = ConvertConfig(lora_load=str(file.parent), save_dir=str(tmp_path / "x"), save_model_type="adapter")
    export_adapter(convert, adapter, said.append)
    assert any(line.startswith("warning: ") and "every lora_B is zero" in line for line in said)
