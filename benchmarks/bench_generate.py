"""Decoding with and without an unmerged adapter, beside transformers and PEFT on the same model in the same process.

    python -m benchmarks.bench_generate [--layers 30] [--prompt 64] [--tokens 48] [--rounds 5]

A generated Llama of SmolLM2-135M's shape, fp32 (on a GPU bf16), greedy; every case makes the same number of tokens from
the same prompts. A round runs each case once, and once for a single token: the time of a token is that of the others,
without the prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness

SHAPE = dict(heads=9, groups=3, head_dim=64, hidden=576, ffn=1536, vocab=49152, tied=True)
GOALS = {"over transformers": 1.2, "adapter over base": 1.10}
BATCHES = (1, 8)
PAIRS = {"base": "transformers", "tuned": "PEFT"}


def make(folder: Path, layers: int) -> None:
    """The model, an adapter on all linears (`adapter`) and the same for PEFT (`lora`), r 8."""
    import torch

    from modellink_lora.checkpoint.adapter_kinds import open_adapter
    from modellink_lora.checkpoint.peft import write_peft
    from tests.helpers.conversion import random_adapter
    from tests.helpers.made_model import Dimensions, made_sharded_model

    made_sharded_model(folder / "hf", Dimensions(**SHAPE, layers=layers, dtype=torch.float32))
    config = json.loads((folder / "hf/config.json").read_text())
    (folder / "hf/config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    random_adapter(folder / "adapter", folder / "hf", r=8)
    write_peft(folder / "lora", open_adapter(folder / "adapter"), base_model=str(folder / "hf"))


def reference_models(folder: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """`transformers` and `PEFT`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {}
    for name in PAIRS.values():
        model: Any = (
            AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, trust_remote_code=False).to(device).eval()
        )
        models[name] = PeftModel.from_pretrained(model, folder / "lora").eval() if name == "PEFT" else model
        models[name].generation_config.eos_token_id = None
    return models


def reference_cases(models: dict[str, Any], prompts: list[list[int]], tokens: int) -> dict[str, Callable[[], object]]:
    import torch

    def generate(model: Any) -> object:
        ids = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return {name: (lambda model=model: generate(model)) for name, model in models.items()}


def our_cases(engine: Any, prompts: list[list[int]], tokens: int) -> dict[str, Callable[[], object]]:
    """`base` and `tuned`."""
    from modellink_lora.inference.request import Choice, Request

    def generate(name: str) -> object:
        requests = [Request(tuple(ids), tokens, choice=Choice(name)) for ids in prompts]
        for row in engine._rows._rows:  # as if the prompts were new: transformers knows nothing of them either
            row.tokens.clear()
        return [completion.ids for completion in engine.generate(requests)]

    return {name: (lambda name=name: generate(name)) for name in ("base", "tuned")}


def bench(layers: int, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    import torch

    from modellink_lora.config.engine import EngineConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.inference.session import open_engine
    from modellink_lora.parallel.context import start_processes
    from tests.helpers.tiny_tokenizer import make_tokenizer

    device = get_device("cuda" if torch.cuda.is_available() else "cpu")
    here = device.activate(0)
    dtype = torch.bfloat16 if device.name == "cuda" else torch.float32
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, layers)
        make_tokenizer(folder / "hf")
        start_processes(
            device.backend, rank=0, world_size=1, init_method=f"file://{folder}/rendezvous", timeout_minutes=5
        )
        config = EngineConfig(load=str(folder / "hf"), lora_load=str(folder / "adapter"), bf16=dtype == torch.bfloat16,
                              max_batch_size=max(BATCHES))  # fmt: skip
        with open_engine(config, ParallelConfig(), model_flags={}, lora_flags={}, device=device, torch_device=here,
                         say=print) as served:  # fmt: skip
            assert served is not None
            generator = torch.Generator().manual_seed(1)
            models = reference_models(folder, here, dtype)
            for batch in BATCHES:
                prompts = torch.randint(10, 49000, (batch, prompt), generator=generator).tolist()
                cases, first = (
                    reference_cases(models, prompts, count) | our_cases(served.engine, prompts, count)
                    for count in (tokens, 1)
                )
                answers = {case: function() for case, function in cases.items()}
                same = {
                    "base": answers["base"] == answers["transformers"],
                    "tuned": answers["tuned"] == answers["PEFT"],
                }
                clock = harness.cpu_seconds if device.name == "cpu" else harness.wall_seconds
                every = {**cases, **{f"{name}, first token": function for name, function in first.items()}}
                seconds = harness.interleaved(every, clock, budget=240, least=3, most=rounds)
                rest = {
                    name: [a - b for a, b in zip(seconds[name], seconds[f"{name}, first token"], strict=True)]
                    for name in cases
                }
                rows = harness.ratios(rest, to="transformers")
                for row in rows.values():
                    row["tokens_per_second"] = batch * (tokens - 1) / row["seconds"]
                    print(f"batch {batch}: {row}", flush=True)
                result[str(batch)] = {
                    "cases": rows, "same_tokens": same,
                    "speed_over": {o: rows[t]["seconds"] / rows[o]["seconds"] for o, t in PAIRS.items()},
                    "adapter_over_base": rows["tuned"]["seconds"] / rows["base"]["seconds"],
                }  # fmt: skip
                print(result[str(batch)], flush=True)
    return {"shape": {**SHAPE, "layers": layers}, "prompt": prompt, "tokens": tokens, "goals": GOALS,
            "dtype": str(dtype).removeprefix("torch."), "clock": clock.__name__, "batches": result}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("layers", 30), ("prompt", 64), ("tokens", 48), ("rounds", 5)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    given = parser.parse_args()
    begun = harness.facts()
    harness.quiet()
    harness.write("generate", bench(given.layers, given.prompt, given.tokens, given.rounds), begun)


if __name__ == "__main__":
    main()
