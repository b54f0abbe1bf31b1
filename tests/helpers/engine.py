"""The engine in this world's process group, and what transformers and PEFT answer in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

STOPS = frozenset({258})


def with_engine(
    use: str, *, parallel: dict[str, Any], config: dict[str, Any], arguments: dict[str, Any] | None = None
) -> Any:
    """What the function called `use` below makes of the engine, on its leader; None on the other ranks."""
    from modellink_lora.config.engine import EngineConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.inference.session import open_engine

    with open_engine(
        EngineConfig(**config), ParallelConfig(**parallel), model_flags={}, lora_flags={}, device=get_device("cpu"),
        torch_device=torch.device("cpu"), say=lambda line: None, replicas=True,
    ) as served:  # fmt: skip
        return served and USES[use](served, **(arguments or {}))


def _generate(served: Any, requests: Sequence[Any]) -> list[list[int]]:
    return [completion.ids for completion in served.engine.generate(requests)]


def _in_pieces(served: Any, requests: Sequence[Any], tokens_at_once: int) -> list[list[int]]:
    from modellink_lora.inference import rows

    usual, rows.TOKENS_AT_ONCE = rows.TOKENS_AT_ONCE, tokens_at_once
    try:
        return _generate(served, requests)
    finally:
        rows.TOKENS_AT_ONCE = usual


def _beams(served: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[tuple[float, list[int]]]]:
    return [
        [(found.score, found.ids) for found in served.engine.beam_search(ids, **settings)] for ids in prompts
    ]  # fmt: skip


def _score(served: Any, pairs: Sequence[Any], **settings: Any) -> list[Any]:
    return served.engine.score(pairs, **settings)


USES: dict[str, Callable[..., Any]] = {
    "generate": _generate, "in_pieces": _in_pieces, "beams": _beams, "score": _score,
}  # fmt: skip


def peft_adapter(hf: Path, folder: Path, *, seed: int = 1, std: float = 0.2, **settings: Any) -> Path:
    """A PEFT adapter on all linears of `hf` whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": names, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return folder


def reference(hf: Path, adapter: Path | None, *, scale: float = 1.0) -> Any:
    """The model of transformers, with the adapter unmerged at `scale`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scale_layer(scale)
    return model.eval()


def reference_answers(
    model: Any, prompts: Sequence[Sequence[int]], count: int, *, stops: frozenset[int] = STOPS, **settings: Any
) -> list[list[int]]:
    """What transformers generates after each prompt alone, without what ended it."""
    model.generation_config.eos_token_id = sorted(stops) or None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=0,
                **{"do_sample": False, **settings},
            )  # fmt: skip
        answers.append([token for token in found[0, len(prompt) :].tolist() if token not in stops])
    return answers
