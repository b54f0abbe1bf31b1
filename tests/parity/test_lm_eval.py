"""lm-eval's own task code gets from the engine, adapter unmerged, what its HF backend gets from the merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from modellink_lora.inference.request import BASE, Choice, Completion, Request
from modellink_lora.inference.text import visible_text
from tests.helpers.conversion import convert
from tests.helpers.engine import peft_adapter
from tests.helpers.jobs import Job
from tests.helpers.lm_eval_tasks import of_engine, of_transformers, write_tasks
from tests.helpers.shared import is_there, shared
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.tiny_tokenizer import make_tokenizer

REAL = "models/stories260K-hf"


# begins with the BOS token, which must not be doubled, and refuses the system message that is then left out
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model `hf`, an adapter `lora`, the merged model `merged/mg2hg` and `tasks`."""
    folder = tmp_path_factory.mktemp("lm-eval")
    if is_there(REAL):
        shutil.copytree(shared(REAL), folder / "hf")
    else:
        make_tokenizer(tiny_model("llama", folder / "hf", std=0.15, vocab_size=400, bos_token_id=1, eos_token_id=2,
                                  pad_token_id=3, max_position_embeddings=512))  # fmt: skip
    (folder / "hf/chat_template.jinja").write_text(TEMPLATE)
    peft_adapter(folder / "hf", folder / "lora", std=0.05)
    convert(folder / "hf", folder / "merged", to="hf", lora_load=str(folder / "lora"))
    write_tasks(folder / "tasks")
    return folder


def of_our_engine(models: Path, adapter: str | None, *, max_length: int | None = None, **settings: Any) -> Any:
    config = {"load": str(models / "hf"), "lora_load": str(models / "lora"), "max_batch_size": 4,
              "max_length": max_length}  # fmt: skip
    return run(of_engine, world_size=1, parallel={}, config=config, adapter=adapter, tasks=models / "tasks",
               settings=settings)[0]  # fmt: skip


def assert_equal(found: Any, expected: Any) -> None:
    (results, answers), (expected_results, expected_answers) = found, expected
    assert set(results) == set(expected_results) and len(results) >= 2
    for name in results:
        numbers = {key: value for key, value in expected_results[name].items() if isinstance(value, int | float)}
        assert len(numbers) >= 2
        for key, value in numbers.items():
            exact = key.startswith(("acc", "exact"))
            assert results[name][key] == (value if exact else pytest.approx(value, rel=1e-5)), (name, key)
    assert answers["local_answers"] == expected_answers["local_answers"]
    for name in set(results) - {"local_answers"}:
        for one, other in zip(_numbers(answers[name]), _numbers(expected_answers[name]), strict=True):
            assert one == pytest.approx(other, abs=1e-3)


def _numbers(value: Any) -> list[float]:
    return [x for part in value for x in _numbers(part)] if isinstance(value, list | tuple) else [float(value)]


def test_scores_are_those_of_the_hf_backend_on_the_merged_model(models: Path) -> None:
    expected = of_transformers(models / "merged/mg2hg", models / "tasks")
    assert_equal(of_our_engine(models, None), expected)
    with pytest.raises(AssertionError):  # the base's are others
        assert_equal(of_our_engine(models, "base"), expected)


def test_what_is_too_long_is_cut_as_by_the_hf_backend(models: Path) -> None:
    found = of_our_engine(models, "tuned", max_length=80)
    assert_equal(found, of_transformers(models / "merged/mg2hg", models / "tasks", max_length=80))
    assert found[1] != of_our_engine(models, "tuned")[1], "nothing was too long"


def test_chat_templates_give_the_prompts_of_the_hf_backend(models: Path) -> None:
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be brief.",
            "names": ["local_choices", "local_answers"]}  # fmt: skip
    expected = of_transformers(models / "merged/mg2hg", models / "tasks", **chat)
    assert_equal(of_our_engine(models, "tuned", **chat), expected)


def test_an_answer_ends_at_a_special_token_of_until(tmp_path: Path) -> None:
    from modellink_lora.evaluation.harness import EngineLM

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    ids = tokenizer.encode("Hi there<|im_end|>tail")

    def generate(requests: Sequence[Request], **_: Any) -> list[Completion]:
        return [Completion(ids, visible_text(tokenizer, ids, request.stop)) for request in requests]

    prompter = SimpleNamespace(tokenizer=tokenizer, stop_ids=frozenset({2}))
    served: Any = SimpleNamespace(engine=SimpleNamespace(generate=generate, max_length=99), about={}, prompter=prompter)
    asked = SimpleNamespace(args=("x", {"until": ["Question:", "<|im_end|>"], "max_gen_toks": 9}))
    assert EngineLM(served, Choice(BASE)).generate_until([asked], disable_tqdm=True) == ["Hi there"]


@pytest.mark.slow
def test_the_command_leads_lm_eval_on_two_processes(models: Path, tmp_path: Path) -> None:
    convert(models / "hf", tmp_path / "mg", to="mg")
    ours = ["--load", tmp_path / "mg", "--lora-load", models / "lora", "--tokenizer-name-or-path", models / "hf",
            "--tensor-model-parallel-size", "2"]  # fmt: skip
    theirs = ["--tasks", "local_choices", "--include_path", models / "tasks", "--output_path", tmp_path / "out",
              "--limit", "6", "--batch_size", "3"]  # fmt: skip
    with Job("-m", "modellink_lora", "lm-eval", *ours, "--", *theirs, log=tmp_path / "log") as job:
        assert job.ends(within=120) == 0, job.text
    (file,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(file.read_text())
    expected = of_transformers(models / "merged/mg2hg", models / "tasks", names=["local_choices"], limit=6)[0]
    found = written["results"]["local_choices"]
    assert all(found[key] == expected["local_choices"][key] for key in ("acc,none", "acc_norm,none"))
    assert written["config"]["model_adapter"] == "tuned" and "TP 2" in written["config"]["model_layout"]
    assert "lm-eval's --batch_size has no effect: give --max-batch-size before the --" in job.text
