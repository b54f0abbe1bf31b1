"""Greedy answers of Hugging Face models to the demo's prompts, and how far their logits are from Megatron's.

    python examples/demo/answers.py --logits logits.safetensors --output answers.json MODEL_FOLDER ...

Everything is computed by transformers; only a prompt's ids come from the template the model was trained with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 40


def read_logits(file: Path) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Prompts, ids [s] and logits [s, v] as the logits job wrote them."""
    with safe_open(file, framework="pt") as tensors:
        prompts = json.loads(tensors.metadata()["prompts"])
        ids, logits = ([tensors.get_tensor(f"{kind}.{n}") for n in range(len(prompts))] for kind in ("ids", "logits"))
    return prompts, ids, logits


def answers(model: Any, tokenizer: Any, ids: list[Tensor]) -> list[str]:
    """The likeliest continuation of each row of `ids`, ending in ` ...` where it was not finished.

    All rows are one batch, padded on the left: what costs time is reading the weights once for every new token.
    """
    longest = max(map(len, ids))
    padded = torch.full((len(ids), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(padded)
    for n, row in enumerate(ids):
        padded[n, longest - len(row) :], mask[n, longest - len(row) :] = row, 1
    output = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[:, longest:]
    finished = (output == tokenizer.eos_token_id).any(dim=1)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text.strip() + ("" if done else " ...") for text, done in zip(texts, finished, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("models", nargs="+")
    given = parser.parse_args()
    prompts, ids, megatron = read_logits(given.logits)
    results = []
    for folder in given.models:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        with torch.no_grad():
            differences = [
                float((model(i[None]).logits[0] - m).abs().max()) for i, m in zip(ids, megatron, strict=True)
            ]
        results.append({"model": folder, "answers": answers(model, tokenizer, ids), "difference": max(differences)})
        print(f"{folder}: {len(ids)} answers, logits at most {max(differences):.2e} from those of {given.logits}")
    largest = max(float(m.abs().max()) for m in megatron)
    document = {"prompts": prompts, "largest_logit": largest, "models": results}
    given.output.write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
