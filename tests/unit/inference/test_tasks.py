"""The tasks over a scripted engine: what each asks of it, what is printed, what stands in the file of a batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.prompt_file import Prompt, prompts_of
from modellink_lora.inference.request import Completion, Request, Sampling
from modellink_lora.inference.tasks import run_tasks


class Echo:
    """Answers a prompt with itself and remembers what it was asked."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices
        self.requests: list[Request] = []
        self.beams: list[dict[str, Any]] = []

    def generate(self, requests: Sequence[Request], *, progress: Callable[[int], None]) -> list[Completion]:
        self.requests += requests
        progress(len(requests))
        return [Completion(list(request.ids), bytes(request.ids).decode(), "stop") for request in requests]

    def beam_search(self, ids: Sequence[int], max_new_tokens: int, **settings: Any) -> list[Completion]:
        self.beams.append(settings)
        return [Completion(list(ids), bytes(ids).decode(), "length")]


PROMPTER = SimpleNamespace(
    stop_ids=frozenset({2}),
    text=lambda text: list(text.encode()),
    chat=lambda messages: list("|".join(message["content"] for message in messages).encode()),
)
TALK: Prompt = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def run(engine: Echo, prompts: Sequence[Prompt], **flags: Any) -> str:
    said: list[str] = []
    run_tasks(prompts, InferConfig(**flags), engine, PROMPTER, seed=10, say=said.append)
    return "\n".join(said)


def test_greedy_takes_the_penalty_alone_and_sampling_all_flags_with_a_seed_for_each_prompt() -> None:
    engine = Echo("tuned", "other")
    run(engine, ["x", "y"], task=("greedy", "do_sample"), repetition_penalty=1.1, top_k=3, adapter_scale=0.5)
    assert [r.sampling for r in engine.requests] == [
        Sampling(repetition_penalty=1.1, seed=10), Sampling(repetition_penalty=1.1, seed=11),
        Sampling(0.7, 3, 0.95, 0.0, 1.1, 10), Sampling(0.7, 3, 0.95, 0.0, 1.1, 11),
    ]  # fmt: skip
    assert {(r.choice.adapter, r.choice.scale, r.stop_ids) for r in engine.requests} == {("tuned", 0.5, frozenset({2}))}
    assert run(base := Echo(), ["x"], task=("greedy",)) and base.requests[0].choice.adapter == "base"


def test_beams_run_prompt_by_prompt_and_know_the_stop_texts() -> None:
    engine = Echo()
    said = run(engine, ["x", "z"], task=("beam_search", "beam_search_with_sampling"), num_beams=3, stop=("END",))
    assert [settings["num_beams"] for settings in engine.beams] == [3] * 4
    assert [settings["sampling"].temperature > 0 for settings in engine.beams] == [False, False, True, True]
    assert all(settings["stop"] == ("END",) for settings in engine.beams)
    assert said.count("ModelLink:\nx\n") == 2 and said.count("ModelLink:\nz\n") == 2


def test_a_batch_is_a_line_for_each_task_and_prompt_and_nothing_is_printed_twice(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    said = run(Echo("tuned"), ["grün", TALK], task=("greedy", "beam_search"), prompt=("-",), output=str(output))
    assert "ModelLink" not in said and said.endswith(f"4 answers written to {output}")
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["task"], row["index"], row["seed"]) for row in rows] == [
        ("greedy", 0, 10), ("greedy", 1, 11), ("beam_search", 0, 10), ("beam_search", 1, 11),
    ]  # fmt: skip
    assert rows[1] == {
        "index": 1, "prompt": TALK, "answer": "a|b|c", "token_ids": list(b"a|b|c"), "finish_reason": "stop",
        "adapter": "tuned", "adapter_scale": 1.0, "seed": 11, "task": "greedy",
    }  # fmt: skip
    assert "grün" in output.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [output]


def test_prompts_are_those_of_the_flag_the_file_or_the_usual_one(tmp_path: Path) -> None:
    assert prompts_of(InferConfig()) == ["how are you?"] and prompts_of(InferConfig(prompt=("a", "b"))) == ["a", "b"]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"messages": TALK}) + "\n")
    assert prompts_of(InferConfig(prompt_file=str(file))) == ["a", TALK]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "line 2: not valid JSON"),
        ('"text"', "line 2: must be"),
        ('{"prompt": 3}', "line 2: must be"),
        ('{"messages": []}', "line 2: must be"),
        ('{"messages": [{"role": "owl", "content": "a"}]}', "a message is"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError) as caught:
        prompts_of(InferConfig(prompt_file=str(file)))
    assert str(file) in str(caught.value) and reason in str(caught.value)
