"""Adapters that the PEFT library made give in our model, merged or not, at any layout, the logits that PEFT gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert import execute
from tests.distributed.test_logits import logits_here
from tests.helpers.conversion import convert, hf_tensors
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.training import hf_to_megatron

TOLERANCE = 1e-5  # of the greatest logit, fp32
PROMPTS = ["Who are you?", "a", "What is the capital of France, and why?"]
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ALL},
    "some projections": {"target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 3},
    "one projection": {"target_modules": ["k_proj"]},
    "rslora": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "patterns": {
        "target_modules": ALL, "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.gate_proj": 7, "down_proj": 1},
        "alpha_pattern": {"v_proj": 5, "0.mlp.up_proj": 40, "o_proj": 9},
    },
    "one layer": {"target_modules": ALL, "layers_to_transform": [1]},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "up_proj"], "lora_alpha": 3},
    "an expression": {"target_modules": r".*(0\.self_attn\.[qk]_proj|1\.mlp\.(down|up)_proj)"},
}  # fmt: skip


def peft_model(hf: Path, **settings: Any) -> Any:
    """transformers' model of `hf` with a PEFT adapter whose factors are all random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}))
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_merged_model_computes_what_peft_computes(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = tiny_model(family, tmp_path / "hf")
    model = peft_model(hf, **settings)
    model.save_pretrained(tmp_path / "peft")
    expected = logits(model, IDS)
    with model.disable_adapter():
        assert distance(logits(model, IDS), expected) > 1000 * TOLERANCE, "the adapter must matter"
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").write_text((hf / "config.json").read_text())
    convert(hf_to_megatron(hf, tmp_path / "mg"), tmp_path / "merged", to="hf", lora_load=str(tmp_path / "peft"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/mg2hg")
    assert distance(logits(merged, IDS), expected) < TOLERANCE


def test_modules_that_were_trained_as_a_whole_take_their_place_when_merging(hf: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    model = peft_model(hf, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "peft")
    for to, load in (("mg", hf), ("hf", tmp_path / "mg")):
        convert(load, tmp_path / to, to=to, **({"lora_load": str(tmp_path / "peft")} if to == "mg" else {}),
                **({"target_tensor_parallel_size": 2} if to == "mg" else {}))  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf/mg2hg")
    assert distance(logits(merged, IDS), logits(model, IDS)) < TOLERANCE
    adapter_alone(tmp_path / "peft", tmp_path / "own", to="adapter", base=hf)
    adapter_alone(tmp_path / "own", tmp_path / "again", to="peft")
    found, expected = hf_tensors(tmp_path / "again"), hf_tensors(tmp_path / "peft")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    adapter_alone(tmp_path / "own", tmp_path / "cut", to="peft", svd_rank=4)
    for folder in ("again", "cut"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), str(tmp_path / folder))
        assert distance(logits(loaded.eval(), IDS), logits(model, IDS)) < TOLERANCE
    for source, more in (("peft", {"base": hf}), ("own", {})):
        with pytest.raises(UserError, match=r"replaces .*output_layer\.weight as a whole \(modules_to_save\): merge"):
            adapter_alone(tmp_path / source, tmp_path / "ranks", to="adapter-ranks", **more)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_exported_again_it_is_the_folder_that_it_was(settings: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    """Through our own format and through ModelLink's rank files at TP2 x PP2."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = peft_model(hf, **settings)
    model.save_pretrained(tmp_path / "peft")
    convert(hf, tmp_path / "own", to="adapter", lora_load=str(tmp_path / "peft"))
    layout = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
    adapter_alone(tmp_path / "own", tmp_path / "ranks", to="adapter-ranks", **layout)
    adapter_alone(tmp_path / "ranks", tmp_path / "again", to="peft")
    found, expected = hf_tensors(tmp_path / "again"), hf_tensors(tmp_path / "peft")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), str(tmp_path / "again"))
    assert torch.equal(logits(loaded.eval(), IDS), logits(model, IDS))


@pytest.mark.parametrize("rank, error", [(4, 0.0), (2, 0.2)])
def test_an_adapter_cut_to_fewer_singular_values_is_near_and_says_how_near(
    rank: int, error: float, hf: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = peft_model(hf, **ADAPTERS["all"])
    model.save_pretrained(tmp_path / "peft")
    said = adapter_alone(tmp_path / "peft", tmp_path / "cut", to="peft", base=hf, svd_rank=rank)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), str(tmp_path / "cut")).eval()
    expected = logits(model, IDS)
    found = distance(logits(loaded, IDS), expected)
    assert (found < TOLERANCE) if not error else (found > 100 * TOLERANCE)
    before, after = hf_tensors(tmp_path / "peft"), hf_tensors(tmp_path / "cut")
    worst = 0.0
    for name in [name for name in before if "lora_A" in name]:
        assert after[name].shape[0] == rank
        update = 2 * before[name.replace("_A", "_B")].double() @ before[name].double()
        cut = after[name.replace("_A", "_B")].double() @ after[name].double()
        best = torch.linalg.svdvals(update)[rank:].square().sum().sqrt()  # no matrix of this rank is nearer
        assert (update - cut).norm() <= best + 1e-5 * update.norm()
        worst = max(worst, float((update - cut).norm() / update.norm()))
    stated = float(re.search(r"greatest (\S+) \(", said)[1])
    assert stated == pytest.approx(worst, abs=1e-3) and stated >= error


def adapter_alone(load: Path, save: Path, *, to: str, base: Path | None = None, **fields: Any) -> str:
    """Convert an adapter, without its base if none is given; what was said."""
    said: list[str] = []
    config = ConvertConfig(
        lora_load=str(load), save_dir=str(save), load_dir=str(base) if base else None, load_model_type="hf",
        save_model_type=to, **fields,
    )  # fmt: skip
    execute.run(config, {}, say=said.append)
    return "\n".join(said)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model `hf`, the same as `mg`, two PEFT adapters and prompts."""
    folder = tmp_path_factory.mktemp("peft")
    hf = tiny_model("llama", folder / "hf")
    tiny_tokenizer(hf_to_megatron(hf, folder / "mg") / "hf")
    for name in ("some projections", "patterns"):
        peft_model(hf, **ADAPTERS[name]).save_pretrained(folder / name)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


@pytest.mark.parametrize("name", ["some projections", "patterns"])
@pytest.mark.parametrize(
    "parallel", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["tp1", "tp2", "pp2"]
)  # tp1: two replicas
def test_the_unmerged_model_computes_what_peft_computes(
    parallel: dict[str, Any], name: str, models: Path, tmp_path: Path
) -> None:
    run(
        logits_here, world_size=2, parallel=parallel, load=str(models / "mg"),
        lora_load=str(models / name), prompt_file=str(models / "prompts.json"), output=str(tmp_path / "x.safetensors"),
    )  # fmt: skip
    model = peft_model(models / "hf", **ADAPTERS[name])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for n in range(len(PROMPTS)):
            expected = logits(model, file.get_tensor(f"ids.{n}")[None])[0]
            assert distance(file.get_tensor(f"logits.{n}"), expected) < TOLERANCE
