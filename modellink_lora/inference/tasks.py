"""The tasks that answer a list of prompts and end: greedy, sampled, and two kinds of beam search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import to_json
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.prompt_file import Prompt, encoded, shown
from modellink_lora.inference.request import Completion, NotFinite, Request, Sampling, default_choice


@dataclass(frozen=True)
class _Task:
    title: str
    samples: bool
    beams: bool


_TASKS = {
    "greedy": _Task("Greedy Search", samples=False, beams=False),
    "do_sample": _Task("Do Sample", samples=True, beams=False),
    "beam_search": _Task("Beam Search", samples=False, beams=True),
    "beam_search_with_sampling": _Task("Beam Search with Sampling", samples=True, beams=True),
}


def sampling_of(config: InferConfig, *, seed: int, samples: bool = True) -> Sampling:
    """The sampling flags; without `samples` the most likely token, penalty applied."""
    if not samples:
        return Sampling(repetition_penalty=config.repetition_penalty, seed=seed)
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty, seed)


def run_tasks(
    prompts: Sequence[Prompt],
    config: InferConfig,
    engine: Any,
    prompter: Any,
    *,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Answer every prompt by every task of `config`; print the answers, or write them to --output.

    Prompt n is sampled with `seed` + n, so that equal prompts get different answers, whatever the batch.
    """
    ids = [encoded(prompt, prompter) for prompt in prompts]
    rows: list[dict[str, Any]] = []
    for name in config.batch_tasks:
        task = _TASKS[name]
        if config.output is None:
            say(f"\n=============== {task.title} ===============")
        began = time.perf_counter()
        choice = default_choice(engine.choices, config.adapter_scale)
        with tqdm(total=len(ids), desc=name, unit="prompt", disable=len(ids) < 2 or None, leave=False) as bar:
            requests = [
                Request(
                    row, config.max_new_tokens, sampling_of(config, seed=seed + n, samples=task.samples),
                    prompter.stop_ids, config.stop, choice,
                )
                for n, row in enumerate(ids)
            ]  # fmt: skip
            answers = _beams(requests, config, engine, bar) if task.beams else engine.generate(
                requests, progress=bar.update
            )  # fmt: skip
        elapsed = f"Elapsed: {time.perf_counter() - began:.2f}s"
        if config.output is None:
            for prompt, answer in zip(prompts, answers):
                say(f"\nYou:\n{shown(prompt)}\n\nModelLink:\n{answer.text}\n")
            say(elapsed)
            continue
        say(f"{task.title}: {len(answers)} answers, {sum(len(a.ids) for a in answers)} tokens. {elapsed}")
        for n, (prompt, answer) in enumerate(zip(prompts, answers)):
            rows.append(
                {"index": n, "prompt": prompt, "answer": answer.text, "token_ids": list(answer.ids),
                 "finish_reason": answer.finish, "adapter": choice.adapter, "adapter_scale": choice.scale,
                 "seed": seed + n, "task": name}
            )  # fmt: skip
    if config.output is not None:
        with replacing_file(Path(config.output)) as temporary:
            temporary.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
        say(f"{len(rows)} answers written to {config.output}")


def _beams(requests: Sequence[Request], config: InferConfig, engine: Any, bar: Any) -> list[Completion]:
    """One prompt after another: the beams of a prompt are the batch."""
    answers = []
    for number, request in enumerate(requests):
        try:
            (best,) = engine.beam_search(
                request.ids, request.max_new_tokens, num_beams=config.num_beams, length_penalty=config.length_penalty,
                sampling=request.sampling, stop_ids=request.stop_ids, stop=request.stop, choice=request.choice,
            )  # fmt: skip
        except NotFinite as error:
            raise NotFinite(error.what, prompt=f"prompt {number + 1}", index=number) from None
        answers.append(best)
        bar.update(1)
    return answers
