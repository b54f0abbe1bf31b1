"""Models whose weights or adapters make NaN or infinity, and what every use of the engine says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BAD = 7  # the token whose embedding `batch_here` spoils; it is on the first tensor rank


def changed(file: Path, **values: float) -> Path:
    """Set the first element of each tensor in a safetensors file whose name ends so, dots written as __."""
    tensors = load_file(file)
    for ending, value in values.items():
        (name,) = [name for name in tensors if name.endswith(ending.replace("__", "."))]
        tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def overflowing(adapter: Path) -> Path:
    """Scale every lora_B of a PEFT folder so that it is finite itself and what it computes is not."""
    file = adapter / "adapter_model.safetensors"
    scaled = {n: t / t.abs().max() * 3e38 if "lora_B" in n else t * 1e6 for n, t in load_file(file).items()}
    save_file(scaled, file)
    return adapter


def loading_here(**config: Any) -> str:
    """What loading says to the user, "" where it is done."""
    from modellink_lora.config.errors import UserError
    from tests.helpers.engine import with_engine

    try:
        with_engine("generate", parallel={}, config=config, arguments={"requests": []})
    except UserError as error:
        return str(error)
    return ""


def uses_here(*, parallel: dict[str, Any], config: dict[str, Any]) -> Any:
    """What each use of the engine says of an adapter that overflows, and the base's answers before and after."""
    from tests.helpers import engine

    engine.USES["each use"] = _each_use
    return engine.with_engine("each use", parallel=parallel, config=config)


def _each_use(served: Any) -> Any:
    from modellink_lora.config.errors import UserError
    from modellink_lora.inference.request import PLAIN, Choice, Request, Sampling

    engine, tuned = served.engine, Choice("tuned")
    prompt, sampled = (3, 1, 4), Sampling(temperature=1.0, seed=1)
    plain = [Request(prompt, 5)]
    uses = {
        "greedy": lambda: engine.generate([Request(prompt, 5), Request(prompt, 5, choice=tuned)]),
        "sampled": lambda: engine.generate([Request(prompt, 5, sampled, choice=tuned)]),
        "stream": lambda: list(engine.stream(Request(prompt, 5, choice=tuned))),
        "settings": lambda: engine.generate([Request(prompt, 5, Sampling(1.0, repetition_penalty=1e-300))]),
        "beams": lambda: engine.beam_search(prompt, 5, choice=tuned),
        "sampled beams": lambda: engine.beam_search(prompt, 5, choice=tuned, sampling=sampled),
        "score": lambda: engine.score([((3,), (1,)), (prompt, (1, 5))], choice=tuned),
    }
    said = {}
    before = engine.generate(plain)[0].ids
    for name, use in uses.items():
        try:
            said[name] = f"no error: {use()}"
        except UserError as error:
            said[name] = str(error)
    scores = engine.score([(prompt, before)], choice=PLAIN)[0]
    return said, before, engine.generate(plain)[0].ids, (scores.greedy, scores.total)


def batch_here(*, parallel: dict[str, Any], config: dict[str, Any], prompts: Sequence[Sequence[int]]) -> Any:
    """Answers to `prompts` computed together; again with BAD spoiled; then those without BAD twice."""
    from tests.helpers import engine

    engine.USES["batch"] = _batch
    return engine.with_engine("batch", parallel=parallel, config=config, arguments={"prompts": prompts})


def _batch(served: Any, prompts: Sequence[Sequence[int]]) -> Any:
    from modellink_lora.inference.request import NotFinite, Request

    def answers(asked: Sequence[Sequence[int]]) -> list[list[int] | str]:
        found: dict[int, list[int] | str] = {served.engine.submit(Request(tuple(ids), 6)): [] for ids in asked}
        while served.engine.busy:
            for number, token in served.engine.step():
                if isinstance(token, NotFinite):
                    found[number] = str(token)
                else:
                    found[number].append(token.id)
        return list(found.values())

    before = answers(prompts)
    with torch.no_grad():
        served.engine.executor.stage.model.embedding.word_embeddings.weight[BAD] = float("nan")
    served.engine._rows.forget()  # what was computed before is computed anew
    spoiled = answers([[*ids] for ids in prompts])
    # of other lengths than what lay in their rows: whatever was left there is behind what they see
    return before, spoiled, answers([ids for ids in prompts if BAD not in ids] * 2)
