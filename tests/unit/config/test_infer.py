"""Tasks and flags of inference.py that fit together, and those that do not."""

from __future__ import annotations

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import BATCH_TASKS, InferConfig, without_effect


def test_without_a_task_four_run_and_a_chat_follows_on_a_terminal_only() -> None:
    config = InferConfig()
    assert config.batch_tasks == BATCH_TASKS and len(BATCH_TASKS) == 4
    assert config.last_task(terminal=True) == "chat" and config.last_task(terminal=False) is None


def test_tasks_run_once_each_and_a_chat_that_is_named_runs_on_a_pipe_too() -> None:
    config = InferConfig(task=("greedy", "do_sample", "greedy", "chat"))
    assert config.batch_tasks == ("greedy", "do_sample") and config.last_task(terminal=False) == "chat"
    assert InferConfig(task=("greedy",)).last_task(terminal=True) is None
    assert InferConfig(task=("web",)).port_of("web") == 7860 and InferConfig(port=0).port_of("server") == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(output="x.jsonl"), "--output is for the answers to your prompts"),
        (dict(output="x.json", prompt=("a",)), "end its name with .jsonl"),
        (dict(output="x.jsonl", prompt=("a",), task=("chat",)), "chat writes no file"),
        (dict(prompt=("a",), prompt_file="p.txt"), "exclude each other"),
        (dict(prompt=("",)), "--prompt '': is empty"),
        (dict(task=("chat", "greedy")), "as the last task"),
        (dict(task=("server", "web")), "server and web end only when they are told to"),
        (dict(temperature=-0.1), "--temperature -0.1"),
        (dict(temperature=float("nan")), "--temperature nan"),
        (dict(top_p=0.0), "--top-p 0.0"),
        (dict(top_k=-1), "--top-k -1"),
        (dict(min_p=1.5), "--min-p 1.5"),
        (dict(repetition_penalty=0.0), "--repetition-penalty 0.0"),
        (dict(num_beams=0), "--num-beams 0"),
        (dict(max_new_tokens=0), "--max-new-tokens 0"),
        (dict(stop=("",)), "--stop ''"),
        (dict(adapter_scale=float("inf")), "--adapter-scale inf"),
        (dict(history_turns=0), "--history-turns 0"),
        (dict(port=70000), "--port 70000"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        InferConfig(**settings)
    assert message in str(caught.value)


def test_flags_that_no_task_looks_at_are_told() -> None:
    (line,) = without_effect(["port", "top_k", "max_new_tokens"], ["greedy", "do_sample"])
    assert line == "--port has no effect here: it is for --task server web"
    assert without_effect(["top_k", "port", "history_turns"], ["web"]) == []
    assert [line.split()[0] for line in without_effect(["num_beams", "temperature"], ["greedy"])] == [
        "--num-beams", "--temperature",
    ]  # fmt: skip
