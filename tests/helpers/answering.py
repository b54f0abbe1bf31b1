"""A tiny model with tokenizer and adapter that answers at once, and jobs of inference.py over it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.helpers.jobs import Job
from tests.helpers.made_model import Dimensions, made_model
from tests.helpers.random_adapters import write_peft_folder
from tests.helpers.tiny_tokenizer import make_tokenizer

MAX_LENGTH = 64  # the made model's positions


def made_pair(folder: Path) -> tuple[Path, Path]:
    """(model with its tokenizer, adapter in PEFT's form), both random; the adapter changes every answer."""
    from transformers import AutoTokenizer

    base = make_tokenizer(folder / "base")
    size = Dimensions(heads=4, groups=2, head_dim=8, hidden=32, ffn=48, vocab=len(AutoTokenizer.from_pretrained(base)))
    made_model(base, size, seed=3)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(size.layers):
        for name, rows in (("q_proj", 32), ("v_proj", 16)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
            tensors[f"{at}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "r": 4,
                "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    return base, write_peft_folder(folder / "adapter", settings, tensors)


def inference(pair: tuple[Path, Path], *words: object, log: Path, launcher: tuple[str, ...] = ()) -> Job:
    return Job("inference.py", "--load", pair[0], "--lora-load", pair[1], *words, log=log, launcher=launcher)


def address(job: Job) -> str:
    """Where a server or web page listens, once it does."""
    job.until(lambda: re.search(r"http://\S+:\d+", job.text))
    found = re.search(r"http://[\d.]+:\d+", job.text)
    assert found
    return found[0]


def ask(url: str, *, client: Any = None, **body: Any) -> dict[str, Any]:
    """The answer of /v1/completions, greedy unless told otherwise."""
    import httpx

    body = {"temperature": 0, "max_tokens": 12, **body}
    answer = (client or httpx).post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())
