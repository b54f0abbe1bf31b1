"""llama.cpp's format: our Hugging Face folders go into it unharmed, and its adapters add what ours add."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.execute import run
from tests.helpers.conversion import TARGETS, convert, hf_tensors, random_adapter
from tests.helpers.gguf_model import PERMUTED, tensors_of, value_of, with_adapter, write_gguf
from tests.helpers.random_adapters import write_peft_folder
from tests.helpers.shared import shared
from tests.helpers.tiny import tiny_model

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def export(adapter: Path, out: Path, base: Path | None = None, **fields: Any) -> str:
    said: list[str] = []
    places = {"load_dir": str(base), "load_model_type": "hf"} if base else {"load_model_type": "mg"}
    config = ConvertConfig(
        save_dir=str(out), lora_load=str(adapter), save_model_type="gguf-adapter", **places, **fields
    )
    run(config, {}, say=said.append)
    return "\n".join(said)


@pytest.mark.parametrize("family, settings", [
    ("llama", {}), ("llama", {"tied": True}), ("qwen2", {}), ("qwen3", {"head_dim": 128}),
], ids=["llama", "tied", "qwen2", "qwen3"])  # fmt: skip
def test_a_merged_folder_is_the_same_model_in_gguf(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = tiny_model(family, tmp_path / "hf", **settings)
    convert(hf, tmp_path / "out", to="hf", lora_load=str(random_adapter(tmp_path / "adapter", hf)))
    merged = tmp_path / "out/mg2hg"
    write_gguf(merged, merged / "model.gguf")
    expected, stored = hf_tensors(merged), tensors_of(merged / "model.gguf")
    assert len(stored) == len(expected)
    q = expected[f"{Q}.weight"]
    assert torch.equal(stored["blk.0.attn_q.weight"], q) == (family not in PERMUTED)
    found = AutoModelForCausalLM.from_pretrained(merged, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def peft(folder: Path, hf: Path, **settings: Any) -> Path:
    """PEFT's: a rank and an alpha of their own for some projections, which share linears with others."""
    found = {name: x for name, x in hf_tensors(hf).items() if name.endswith("_proj.weight")}
    own = {"r": 4, "lora_alpha": 8.0, "use_rslora": False, "bias": "none", "modules_to_save": None, "peft_type": "LORA",
           "rank_pattern": {Q: 6}, "alpha_pattern": {Q: 5.0, K: 3.0}, "task_type": "CAUSAL_LM",
           "target_modules": sorted({n.split(".")[-2] for n in found}), **settings}  # fmt: skip
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, weight in found.items():
        module, (rows, columns) = name.removesuffix(".weight"), weight.shape
        r = own["rank_pattern"].get(module, own["r"])
        for factor, shape in (("A", (r, columns)), ("B", (rows, r))):
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = torch.randn(shape, generator=generator) * 0.1
    return write_peft_folder(folder, own, tensors)


OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"linear_fc1": 3}, "alpha_pattern": {"linear_proj": 7.3}},
    "rslora": {"use_rslora": True, "alpha": 7.3},
}


@pytest.mark.parametrize("kind", [*OURS, "peft", "peft-rslora"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_adds_what_merging_adds(family: str, kind: str, tmp_path: Path) -> None:
    hf = tiny_model(family, tmp_path / "hf", std=0.02, **({"head_dim": 32} if family == "llama" else {}))
    if kind in OURS:
        adapter = random_adapter(tmp_path / "adapter", hf, **OURS[kind])
        said = export(adapter, tmp_path / "gguf")
    else:
        adapter = peft(tmp_path / "adapter", hf, use_rslora=kind == "peft-rslora")
        said = export(adapter, tmp_path / "gguf", hf)
    assert ("multiplied into their lora_b" in said) == (kind not in ("plain", "rslora"))
    convert(hf, tmp_path / "out", to="hf", lora_load=str(adapter))
    for folder in (hf, tmp_path / "out/mg2hg"):
        write_gguf(folder, folder / "model.gguf")
    base, merged = tensors_of(hf / "model.gguf"), tensors_of(tmp_path / "out/mg2hg/model.gguf")
    found = with_adapter(hf / "model.gguf", tmp_path / "gguf/adapter.gguf")
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(changed) == 7 * 2
    for name in base:
        assert float((found[name] - merged[name]).abs().max()) <= 1e-6 * float(merged[name].abs().max()), name


def test_what_the_file_says(tmp_path: Path) -> None:
    hf = tiny_model("mistral", tmp_path / "hf")
    out = tmp_path / "out"
    assert "dry run" in export(random_adapter(tmp_path / "a", hf), out, dry_run=True) and not out.exists()
    export(random_adapter(tmp_path / "a", hf, targets=TARGETS[:1]), out)
    said = {key: value_of(out / "adapter.gguf", key)
            for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")}  # fmt: skip
    assert said == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
                    "adapter.lora.alpha": 8.0}  # fmt: skip
    expected = {f"blk.{i}.attn_{p}.weight.lora_{f}" for i in (0, 1) for p in "qkv" for f in "ab"}
    tensors = tensors_of(out / "adapter.gguf")
    assert tensors.keys() == expected and tensors["blk.0.attn_k.weight.lora_b"].shape == (32, 4)
    with pytest.raises(UserError, match=r"adapter.gguf exists: .* --overwrite"):
        export(tmp_path / "a", out)


def test_the_real_model_and_a_random_adapter(tmp_path: Path) -> None:
    hf = shared("models/stories260K-hf")
    adapter = random_adapter(tmp_path / "adapter", hf)
    export(adapter, tmp_path)
    convert(hf, tmp_path / "out", to="hf", lora_load=str(adapter))
    write_gguf(hf, tmp_path / "model.gguf")
    write_gguf(tmp_path / "out/mg2hg", tmp_path / "merged.gguf")
    found = with_adapter(tmp_path / "model.gguf", tmp_path / "adapter.gguf")
    for name, expected in tensors_of(tmp_path / "merged.gguf").items():
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-5, atol=1e-6)


def test_families_whose_rows_are_not_known_are_refused(tmp_path: Path) -> None:
    hf = tiny_model("gemma", tmp_path / "hf")
    with pytest.raises(UserError, match=r"is for llama, mistral, qwen2, qwen3 models, .* adapts a gemma model"):
        export(random_adapter(tmp_path / "a", hf), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(tmp_path / "a", tiny_model("llama", tmp_path / "hf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf, which is not installed: pip install"):
        export(adapter, tmp_path / "out")
