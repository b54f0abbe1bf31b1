"""Three small lm-eval tasks on local files, and lm-eval run on them with our engine and with its own HF backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("local_choices", "local_texts", "local_answers")
_WORDS = ["one", "two", "red", "tree", "had", "little", "play", "day", "with", "happy", "found", "dog", "the", "big"]


def write_tasks(folder: Path) -> Path:
    """Files and task descriptions below `folder`: multiple choice, rolling perplexity and written answers."""
    folder.mkdir(exist_ok=True)

    def words(seed: int, count: int) -> str:
        return " ".join(_WORDS[(seed * 7 + i * (seed + 3)) % len(_WORDS)] for i in range(count))

    rows = [
        {"question": f"{words(n, 3 + 5 * (n % 4))}?", "choices": [words(n + k, 1 + k % 2) for k in range(4)],
         "gold": n % 4, "text": words(n, 12 + 40 * (n % 3)), "answer": words(n, 1)}
        for n in range(12)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
    }  # fmt: skip
    tasks = {
        "local_choices": {
            "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}", "num_fewshot": 2, "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_texts": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "local_answers": {
            "output_type": "generate_until", "doc_to_text": "{{question}} {{text}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", ". ", "to "], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return folder


def outcome(
    model: Any, tasks: Path, *, names: Sequence[str] = NAMES, **settings: Any
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Results and the model's raw answers by task, as lm-eval's evaluator gives them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model, tasks=list(names), task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0, **settings,
    )  # fmt: skip
    assert found is not None
    answers = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers


def of_transformers(
    model: Path, tasks: Path, *, max_length: int | None = None, **settings: Any
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The same by lm-eval's own backend, from a Hugging Face folder."""
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(str(model), device="cpu", dtype="float32", batch_size=3, max_length=max_length)
    return outcome(backend, tasks, **settings)


def of_engine(
    parallel: dict[str, Any], config: dict[str, Any], adapter: str | None, tasks: Path, settings: dict[str, Any]
) -> Any:
    """The same by the engine of this world's process group, on its leader."""
    from modellink_lora.evaluation.harness import EngineLM, choice_of
    from tests.helpers import engine

    def judged(served: Any) -> Any:
        return outcome(EngineLM(served, choice_of(served, adapter)), tasks, **settings)

    engine.USES["lm-eval"] = judged
    return engine.with_engine("lm-eval", parallel=parallel, config=config)
