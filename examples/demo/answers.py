"""Greedy answers of a Hugging Face model to the demo's prompts, and the distance of its logits from Megatron's.

    python examples/demo/answers.py MODEL_FOLDER answers.json [logits.safetensors]

Everything is computed by transformers; only the prompt's ids come from the template the model was trained with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from modellink_lora.data.prompt import Conversation, Message, encode_prompt
from modellink_lora.data.templates import get_template
from modellink_lora.data.tokenizer import load_tokenizer

PROMPT_TYPE, NEW_TOKENS = "chatml", 56
PROMPTS = Path(__file__).with_name("prompts.json")


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The likeliest continuation, cut at a word when it grows long."""
    ids = encode_prompt(Conversation((Message("user", prompt),)), get_template(PROMPT_TYPE), tokenizer)
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[0, len(ids) :]
    finished = int(output[-1]) == tokenizer.eos_token_id
    return tokenizer.decode(output, skip_special_tokens=True).strip() + ("" if finished else " ...")


def largest_differences(model: Any, logits: Path) -> list[tuple[float, float]]:
    """(max |this model - file|, max |file|) of every prompt in a file of `modellink_lora logits`."""
    result = []
    with safe_open(logits, framework="pt") as file, torch.no_grad():
        for n in range(len(file.keys()) // 2):
            expected = file.get_tensor(f"logits.{n}")  # [s, v]
            found = model(file.get_tensor(f"ids.{n}")[None]).logits[0].float()
            result.append((float((found - expected).abs().max()), float(expected.abs().max())))
    return result


def main(folder: str, output: str, logits: str | None = None) -> None:
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(folder, prompt_type=PROMPT_TYPE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = {}
    for prompt in json.loads(PROMPTS.read_text(encoding="utf-8")):
        answers[prompt] = answer(model, tokenizer, prompt)
        print(f"{prompt}\n    {answers[prompt]}", flush=True)
    differences = largest_differences(model, Path(logits)) if logits else []
    Path(output).write_text(json.dumps({"answers": answers, "differences": differences}, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
