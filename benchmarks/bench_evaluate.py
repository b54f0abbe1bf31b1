"""Scoring multiple-choice questions on our engine beside lm-eval's Hugging Face backend, in the same process.

    python -m benchmarks.bench_evaluate [--layers 30] [--questions 16] [--rounds 3]

Both get the same requests of lm-eval: questions of several subjects, five worked examples in front, four letters to
score. The model is a generated Llama of SmolLM2-135M's shape with its adapter merged (lm-eval) and unmerged (ours), in
fp32; a batch of 8 on both sides. A round runs each once. The examples in front are computed anew in every round.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.bench_generate import SHAPE, make

GOAL = 2.0  # samples a second over lm-eval's
BATCH, SUBJECTS = 8, 2
WORDS = ("capital", "France", "three", "primary", "colours", "sum", "answer", "red", "yellow", "system", "helpful")


def questions(count: int) -> list[tuple[str, str]]:
    """(context, continuation) of four letters after each question; the model is random, so any words will do."""
    draw = random.Random(3)

    def item(letter: str) -> str:
        text = " ".join(draw.choices(WORDS, k=12)) + "?\n"
        return text + "".join(f"{x}. {' '.join(draw.choices(WORDS, k=3))}\n" for x in "ABCD") + f"Answer:{letter}"

    pairs = []
    for subject in range(SUBJECTS):
        shots = f"Questions about subject {subject}.\n\n" + "\n\n".join(item(f" {x}") for x in "ABCDA")
        for _ in range(count // SUBJECTS):
            asked = f"{shots}\n\n{item('')}"
            pairs += [(asked, f" {letter}") for letter in "ABCD"]
    return pairs


def bench(layers: int, count: int, rounds: int) -> dict[str, Any]:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modellink_lora.config.engine import EngineConfig
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.evaluation.harness import EngineLM
    from modellink_lora.inference.request import Choice
    from modellink_lora.inference.session import open_engine
    from modellink_lora.parallel.context import start_processes
    from tests.helpers.conversion import convert
    from tests.helpers.tiny_tokenizer import make_tokenizer

    device = get_device("cpu")
    here = device.activate(0)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=n) for n, pair in enumerate(questions(count))
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, layers)
        make_tokenizer(folder / "hf")
        convert(folder / "hf", folder / "mg", to="mg")
        convert(folder / "mg", folder / "merged", to="hf", lora_load=str(folder / "adapter"))
        merged = AutoModelForCausalLM.from_pretrained(
            folder / "merged/mg2hg", dtype=torch.float32, trust_remote_code=False
        )
        theirs = HFLM(
            pretrained=merged,
            tokenizer=AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=False),
            batch_size=BATCH,
        )
        start_processes("gloo", rank=0, world_size=1, init_method=f"file://{folder}/rendezvous", timeout_minutes=5)
        config = EngineConfig(load=str(folder / "hf"), lora_load=str(folder / "adapter"), max_batch_size=BATCH)
        with open_engine(config, ParallelConfig(), model_flags={}, lora_flags={}, device=device, torch_device=here,
                         say=print) as served:  # fmt: skip
            assert served is not None
            ours = EngineLM(served, Choice("tuned"))
            tokens = len(ours.tok_encode(requests[0].args[0]))

            def scored(model: Any) -> list[float]:
                for row in served.engine._rows._rows:
                    row.tokens.clear()
                return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]

            found = {"lm-eval": scored(theirs), "ours": scored(ours)}
            gap = max(abs(a - b) for a, b in zip(*found.values(), strict=True))
            answers = {
                name: [max(range(4), key=lambda i: scores[4 * n + i]) for n in range(len(scores) // 4)]
                for name, scores in found.items()
            }
            seconds = harness.interleaved(
                {"lm-eval": lambda: scored(theirs), "ours": lambda: scored(ours)}, harness.cpu_seconds,
                budget=600, least=2, most=rounds,
            )  # fmt: skip
    rows = harness.ratios(seconds, to="lm-eval")
    for name, row in rows.items():
        row["samples_per_second"] = len(requests) / 4 / row["seconds"]
        print(name, row, flush=True)
    return {
        "shape": {**SHAPE, "layers": layers}, "goal": GOAL, "questions": len(requests) // 4, "tokens": tokens,
        "batch": BATCH, "clock": "cpu_seconds", "cases": rows, "greatest_score_difference": gap,
        "same_answers": answers["ours"] == answers["lm-eval"],
        "speed_over_lm_eval": rows["lm-eval"]["seconds"] / rows["ours"]["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("layers", 30), ("questions", 16), ("rounds", 3)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    given = parser.parse_args()
    begun = harness.facts()
    harness.quiet()
    harness.write("evaluate", bench(given.layers, given.questions, given.rounds), begun)


if __name__ == "__main__":
    main()
