"""Logits that the unmerged model gives at TP2 and PP2, against transformers with the adapter added by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.training import TARGETS, fine_tune_here, hf_to_megatron, train_flags, write_corpus

TOLERANCE = 1e-5  # of the largest logit, in fp32
PROMPTS = ["Who are you?", "a", "What is the capital of France, and why?"]
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = pytest.mark.parametrize(
    "parallel", [{"tensor_model_parallel_size": 2}, TP2_SP, PP2], ids=["tp2", "tp2-sp", "pp2"]
)


def logits_here(*, parallel: dict[str, Any], **config: Any) -> None:
    """The whole job in this world's process group."""
    from modellink_lora.config.logits import LogitsConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.inference.logits import prompt_logits

    prompt_logits(
        LogitsConfig(**config), ParallelConfig(**parallel), device=get_device("cpu"), torch_device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a Hugging Face model `hf`, the same as `mg`, an adapter `lora` trained at TP2, and prompts."""
    folder = tmp_path_factory.mktemp("logits")
    hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    run(
        fine_tune_here,
        world_size=2,
        train=train_flags(load=str(folder / "mg"), save=str(folder / "lora")),
        data={"data_path": (write_corpus(folder / "data"),), "seq_length": 32},
        parallel=TP2_SP,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
    )
    tiny_tokenizer(folder / "mg" / "hf")  # after the training, whose generated data name no tokenizer
    return folder


def by_job(models: Path, output: Path, parallel: dict[str, Any], **config: Any) -> list[tuple[Tensor, Tensor]]:
    """(ids, logits) of each prompt as the job writes them."""
    run(
        logits_here, world_size=2, parallel=parallel, load=str(models / "mg"),
        prompt_file=str(models / "prompts.json"), output=str(output), **config,
    )  # fmt: skip
    with safe_open(output, framework="pt") as file:
        return [(file.get_tensor(f"ids.{n}"), file.get_tensor(f"logits.{n}")) for n in range(len(PROMPTS))]


def by_transformers(models: Path, ids: Tensor, *, adapter: bool) -> Tensor:
    """Logits [s, v] of transformers' own class, with B A added to its weights by hand where `adapter`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "hf", dtype=torch.float32)
    if adapter:
        _merge_by_hand(model, models / "lora")
    with torch.no_grad():
        return model(ids[None]).logits[0]


def _merge_by_hand(model: Any, lora: Path) -> None:
    """W += 2 B A, with the fused rows of qkv (per group: queries, key, value) and fc1 (gate, up) written out."""
    from tests.helpers.training import adapter_tensors

    tensors = adapter_tensors(lora)
    d = model.config.hidden_size // model.config.num_attention_heads
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            where = f"decoder.layers.{n}."
            delta = {
                name: 2.0 * tensors[f"{where}{name}.lora_B"] @ tensors[f"{where}{name}.lora_A"]
                for name in (
                    "self_attention.linear_qkv",
                    "self_attention.linear_proj",
                    "mlp.linear_fc1",
                    "mlp.linear_fc2",
                )
            }
            q, k, v = [], [], []
            for group in delta["self_attention.linear_qkv"].split((per_group + 2) * d):
                q.append(group[: per_group * d])
                k.append(group[per_group * d : (per_group + 1) * d])
                v.append(group[(per_group + 1) * d :])
            layer.self_attn.q_proj.weight += torch.cat(q)
            layer.self_attn.k_proj.weight += torch.cat(k)
            layer.self_attn.v_proj.weight += torch.cat(v)
            layer.self_attn.o_proj.weight += delta["self_attention.linear_proj"]
            gate, up = delta["mlp.linear_fc1"].chunk(2)
            layer.mlp.gate_proj.weight += gate
            layer.mlp.up_proj.weight += up
            layer.mlp.down_proj.weight += delta["mlp.linear_fc2"]


@LAYOUTS
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_logits_equal_those_of_transformers(
    adapter: bool, parallel: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    lora = {"lora_load": str(models / "lora")} if adapter else {}
    for ids, logits in by_job(models, tmp_path / "x.safetensors", parallel, **lora):
        expected = by_transformers(models, ids, adapter=adapter)
        largest = float(expected.abs().max())
        assert logits.shape == expected.shape
        assert float((logits - expected).abs().max()) < TOLERANCE * largest
        if adapter:
            base = by_transformers(models, ids, adapter=False)
            assert float((logits - base).abs().max()) > 100 * TOLERANCE * largest, "the adapter must be visible"


def test_ids_are_the_prompt_inside_its_template(models: Path, tmp_path: Path) -> None:
    found = by_job(models, tmp_path / "x.safetensors", PP2, prompt_type="default")
    assert [bytes(ids.tolist()).decode() for ids, _ in found] == [f"Human: {p}\nAssistant:" for p in PROMPTS]
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["prompts"]) == PROMPTS


def test_a_prompt_longer_than_the_model_can_read_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("short\n" + "x" * 129 + "\n")
    with pytest.raises(AssertionError, match="prompt 2 has 129 tokens, the model has 128 positions"):
        run(
            logits_here, world_size=2, parallel=PP2, load=str(models / "mg"),
            prompt_file=str(tmp_path / "long.txt"), output=str(tmp_path / "x.safetensors"),
        )  # fmt: skip
    assert not (tmp_path / "x.safetensors").exists()
