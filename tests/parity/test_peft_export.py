"""An exported adapter loads in the PEFT library unmodified, and PEFT and our merge agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.tiny import tiny_model

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
TOLERANCE = 1e-5  # of the greatest logit, fp32


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("lora", [
    {},
    {"use_rslora": True},
    {"targets": ("linear_qkv", "linear_fc2")},
    {"rank_pattern": {"linear_proj": 7, "decoder.layers.1.mlp.linear_fc1": 2}, "alpha_pattern": {"linear_qkv": 3.0}},
], ids=["all", "rslora", "two targets", "patterns"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_peft_computes_what_the_merged_model_computes(family: str, lora: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = tiny_model(family, tmp_path / "hf")
    adapter = random_adapter(tmp_path / "adapter", hf, **lora)
    convert(hf, tmp_path / "mg", to="mg", use_mcore_models=True, target_tensor_parallel_size=2)
    convert(tmp_path / "mg", tmp_path / "merged", to="hf", lora_load=str(adapter))
    convert(hf, tmp_path / "peft", to="peft", lora_load=str(adapter))

    base = AutoModelForCausalLM.from_pretrained(hf)
    plain = logits(base)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged/mg2hg"))
    peft = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    assert distance(logits(peft), merged) < TOLERANCE
    assert distance(plain, merged) > 1000 * TOLERANCE, "the adapter must matter"

    by_peft = peft.merge_and_unload().state_dict()
    for name, tensor in hf_tensors(tmp_path / "merged/mg2hg").items():
        torch.testing.assert_close(by_peft[name], tensor, rtol=0, atol=2e-6)
