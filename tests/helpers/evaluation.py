"""Evaluations in this world's process group, with an adapter that changes answers, and an independent loop beside."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from tests.helpers.random_adapters import write_peft_folder


def evaluate_here(
    *, config: dict[str, Any], model: dict[str, Any], parallel: dict[str, Any] | None = None
) -> tuple[list[str], int]:
    """The whole job after its flags are parsed: what it said on this rank, and how many choices this rank scored."""
    from modellink_lora.config.engine import EngineConfig
    from modellink_lora.config.evaluate import EvalConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.evaluation.runner import evaluate, read_items
    from modellink_lora.inference.session import open_engine

    said: list[str] = []
    scored = 0
    wanted, of = EvalConfig(**config), EngineConfig(**model)
    work = read_items(wanted, of)
    with open_engine(
        of, ParallelConfig(**(parallel or {})), model_flags={}, lora_flags={}, device=get_device("cpu"),
        torch_device=torch.device("cpu"), say=said.append, replicas=True, adopt_template=False,
    ) as served:  # fmt: skip
        if served is not None:
            score = served.engine.score

            def counted(pairs: Any, **arguments: Any) -> Any:
                nonlocal scored
                scored += len(pairs)
                return score(pairs, **arguments)

            served.engine.score = counted  # type: ignore[method-assign]
            evaluate(
                served.engine, served.prompter, wanted, model=of, work=work, replica=served.replica,
                replicas=served.replicas, gather=served.gather, say=said.append,
            )  # fmt: skip
    return said, scored


def strong_adapter(folder: Path, hf: Path) -> Path:
    """A PEFT adapter on the attention of a Llama model, large enough to change answers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(hf)
    width, generator = config.hidden_size, torch.Generator().manual_seed(1)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.0, "bias": "none", "target_modules": ["o_proj", "q_proj"], "modules_to_save": None,
    }  # fmt: skip
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name in settings["target_modules"]:
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * 0.1
    return write_peft_folder(folder, settings, tensors)


@torch.no_grad()
def scores_by_transformers(
    hf: Path, adapter: Path | None, *, test: Path, subject: str, shots: int, questions: int
) -> list[dict[str, float]]:
    """Log-probability of each letter, by transformers and PEFT alone, one forward pass a choice."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    longest = model.config.max_position_embeddings

    def rows(file: Path) -> list[list[str]]:
        with open(file, newline="", encoding="utf-8") as source:
            return list(csv.reader(source))

    def asked(row: list[str]) -> str:
        return row[0] + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5])) + "\nAnswer:"

    head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}."
    for row in rows(test.parent / "dev" / f"{subject}_dev.csv")[:shots]:
        head += f"\n\n{asked(row)} {row[5]}"
    found = []
    for row in rows(test / f"{subject}_test.csv")[:questions]:
        prompt = f"{head}\n\n{asked(row)}"
        scores = {}
        for letter in "ABCD":
            context, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {letter}")
            answer = whole[len(context) :]
            ids = torch.tensor([(context + answer)[-longest - 1 :]])
            logprobs = model(ids[:, :-1]).logits[0].log_softmax(-1)
            scores[letter] = sum(float(logprobs[-len(answer) + n, token]) for n, token in enumerate(answer))
        found.append(scores)
    return found
