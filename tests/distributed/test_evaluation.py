"""Evaluations with the real engine: scores of transformers and PEFT, data and tensor parallel, tasks that write."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.evaluation.reading import GRAMMAR
from tests.helpers.evaluation import evaluate_here, scores_by_transformers, strong_adapter
from tests.helpers.shared import shared
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model

SUBJECTS = ("abstract_algebra", "marketing")
QUESTIONS, SHOTS = 4, 2
SAME = 2e-4  # sums of fp32 in another order


def generated_exam(folder: Path) -> Path:
    """Questions in the layout of MMLU, for machines without the published ones."""
    for split, count in (("dev", 5), ("test", QUESTIONS)):
        (folder / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as file:
                rows = [
                    [f"Which, {n}\n?", *(f"{subject[:3]} {n * k}" for k in range(4)), "ABCD"[n % 4]]
                    for n in range(count)
                ]
                csv.writer(file).writerows(rows)
    return folder / "test"


@pytest.fixture(scope="module", params=["stories260K and MMLU", pytest.param("generated", marks=pytest.mark.slow)])
def exam(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`hf`, `adapter` and `test`, the folder of the test files."""
    folder = tmp_path_factory.mktemp("exam")
    if request.param == "generated":
        hf = tiny_model("llama", folder / "hf", tokenizer=True, max_position_embeddings=512)
        test = generated_exam(folder)
    else:
        hf, data = shared("models/stories260K-hf"), shared("data/mmlu/data")
        test = folder / "test"
        for split in ("dev", "test"):
            (folder / split).mkdir()
            for subject in SUBJECTS:
                shutil.copy(data / split / f"{subject}_{split}.csv", folder / split)
    return {"hf": hf, "test": test, "adapter": strong_adapter(folder / "adapter", hf)}


def evaluated(
    exam: dict[str, Path], save: Path, *, layout: dict[str, Any] | None = None, **config: Any
) -> list[tuple[list[str], int]]:
    """Of each process: what it said about base and tuned model, and how many choices it scored."""
    return run(
        evaluate_here,
        world_size=2,
        config={"task": ("mmlu",), "task_data_path": (f"{exam['test']}/",), "num_shots": SHOTS,
                "max_eval_samples": QUESTIONS, "save": str(save), **config},
        model={"load": str(exam["hf"]), "lora_load": str(exam["adapter"]), "max_batch_size": 4},
        parallel=layout,
    )  # fmt: skip


def items(save: Path, task: str = "mmlu") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / task / "items.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def judged(exam: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Results and log of two replicas, which have shared the work."""
    save = tmp_path_factory.mktemp("judged")
    (said, first), (nothing, second) = evaluated(exam, save)
    assert first == second == len(SUBJECTS) * QUESTIONS // 2 * len("ABCD") * len(("base", "tuned"))
    assert nothing == []
    return save, said


def test_scores_are_those_of_transformers_and_peft(exam: dict[str, Path], judged: tuple[Path, list[str]]) -> None:
    save, said = judged
    found = items(save)
    assert len(found) == len(SUBJECTS) * QUESTIONS
    for subject in SUBJECTS:
        for name, adapter in (("base", None), ("tuned", exam["adapter"])):
            wanted = scores_by_transformers(
                exam["hf"], adapter, test=exam["test"], subject=subject, shots=SHOTS, questions=QUESTIONS
            )
            scores = [item["models"][name]["scores"] for item in found if item["subject"] == subject]
            assert scores == [pytest.approx(each, abs=SAME) for each in wanted]
            best = [max(each, key=lambda letter: each[letter]) for each in wanted]
            assert [i["models"][name]["prediction"] for i in found if i["subject"] == subject] == best
    base, tuned = ([item["models"][name]["scores"]["A"] for item in found] for name in ("base", "tuned"))
    assert max(abs(a - b) for a, b in zip(base, tuned, strict=True)) > 100 * SAME
    # what programs of ModelLink's users look for, of the tuned model, and once
    right = sum(item["models"]["tuned"]["prediction"] == item["answer"] for item in found)
    assert [line for line in said if "acc = " in line] == [f"mmlu acc = {right}/{len(found)}={right / len(found):.6f}"]
    assert sorted(path.name for path in (save / "mmlu").iterdir()) == [
        "accuracy.png", "items.jsonl", "results.csv", "results.json", "settings.json"
    ]  # fmt: skip


def test_two_replicas_and_two_tensor_ranks_find_the_same(
    exam: dict[str, Path], judged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    evaluated(exam, tmp_path, layout={"tensor_model_parallel_size": 2})
    for one, other in zip(items(judged[0]), items(tmp_path), strict=True):
        for name in ("base", "tuned"):
            assert one["models"][name]["scores"] == pytest.approx(other["models"][name]["scores"], abs=SAME)
        assert {k: v for k, v in one.items() if k != "models"} == {k: v for k, v in other.items() if k != "models"}
    total = json.loads((tmp_path / "mmlu/results.json").read_text())["results"][-1]
    assert (total["name"], total["question_n"]) == ("total", len(SUBJECTS) * QUESTIONS)


def test_what_another_number_of_replicas_has_begun_is_finished(
    exam: dict[str, Path], judged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(judged[0], tmp_path, dirs_exist_ok=True)
    done = items(tmp_path)
    folder = tmp_path / "mmlu"
    (folder / "items.jsonl").unlink()
    # as if three replicas had been killed, each after an item of its own, whose answers nobody will find again
    for rank in range(3):
        done[rank]["models"]["base"]["prediction"] = "kept"
        (folder / f"items.rank{rank}.jsonl").write_text(json.dumps(done[rank]) + "\n")
    said = evaluated(exam, tmp_path)[0][0]
    assert any("3 answered before" in line for line in said)
    again = items(tmp_path)
    assert [item["models"]["base"]["prediction"] for item in again[:3]] == ["kept"] * 3
    assert [(i["subject"], i["number"], i["answer"]) for i in again] == [
        (i["subject"], i["number"], i["answer"]) for i in done
    ]
    assert not list(folder.glob("items.rank*"))


def test_tasks_that_write_their_answers_run_beside_those_that_score(exam: dict[str, Path], tmp_path: Path) -> None:
    files = {
        "gsm8k/test.jsonl": {"question": "1+1?", "answer": "#### 2"},
        "boolq/dev.jsonl": {"passage": "Snow.", "question": "is it", "answer": True},
        "agieval/math.jsonl": {"passage": "", "question": "x?", "options": None, "label": None, "answer": "1"},
    }
    for name, row in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    tasks = tuple(name.split("/")[0] for name in files)
    (said, _), _ = evaluated(
        exam, tmp_path / "out", task=tasks, task_data_path=tuple(str(tmp_path / task) for task in tasks), num_shots=0,
        max_new_tokens=6,
    )  # fmt: skip
    assert [line.split(" = ")[0] for line in said if " acc = " in line] == ["gsm8k acc", "boolq acc", "AGIEval acc"]
    assert set(items(tmp_path / "out", "boolq")[0]["models"]["base"]["scores"]) == {"Yes", "No"}
    for task in ("gsm8k", "agieval"):
        (item,) = items(tmp_path / "out", task)
        assert item["models"]["tuned"]["text"] and "scores" not in item["models"]["tuned"]
    # an evaluation whose answers were read by other rules is not continued; scores have nothing to do with them
    settings = {task: json.loads((tmp_path / "out" / task / "settings.json").read_text()) for task in tasks}
    assert [settings[task].get("grammar") for task in tasks] == [GRAMMAR, None, GRAMMAR]


def test_a_prompt_in_a_template_is_scored_on_the_letter_itself(exam: dict[str, Path], tmp_path: Path) -> None:
    arguments = {
        "config": {"task": ("mmlu",), "task_data_path": (str(exam["test"]),), "num_shots": 1, "max_eval_samples": 2,
                   "tuned_only": True},
        "model": {"load": str(exam["hf"]), "lora_load": str(exam["adapter"]), "prompt_type": "alpaca"},
    }  # fmt: skip
    for scoring in ("logprob", "generate"):
        arguments["config"] |= {"save": str(tmp_path / scoring), "scoring": scoring, "max_new_tokens": 4}  # type: ignore[operator]
        run(evaluate_here, world_size=2, **arguments)
    scored, written = items(tmp_path / "logprob"), items(tmp_path / "generate")
    assert list(scored[0]["models"]) == ["tuned"]
    assert scored[0]["models"]["tuned"]["scores"] and written[0]["models"]["tuned"]["text"] is not None
    assert [item["prompt"] for item in scored] == [item["prompt"] for item in written]
