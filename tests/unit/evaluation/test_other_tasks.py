"""The benchmarks that are no exams of four choices: their files, prompts, and how written answers are read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.index import TASKS
from modellink_lora.evaluation.item import Item, Options
from tests.helpers.shared import shared

BOOLQ = {"passage": "Snow is white.", "question": "is snow white", "answer": True}
GSM8K = {"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\nIt is five thousand.\n#### 5,000"}


def write(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file.parent


def items(task: str, folder: Path, **options: object) -> list[Item]:
    return TASKS[task].items(folder, Options(**options))  # type: ignore[arg-type]


def read(task: str, item: Item, text: str) -> tuple[str, bool]:
    prediction = TASKS[task].read(item, text)
    return prediction, TASKS[task].judge(prediction, item)


def test_boolq_asks_for_yes_or_no(tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl", [BOOLQ, {**BOOLQ, "answer": False}])
    first, second = items("boolq", tmp_path)
    assert first.prompt == "Snow is white.\nQuestion: is snow white?\nAnswer:"
    assert (first.answer, second.answer, first.choices) == ("Yes", "No", {"Yes": " Yes", "No": " No"})
    assert read("boolq", first, " yes, it is")[1] and read("boolq", second, "False.")[1]
    assert read("boolq", first, "Yesterday") == ("", False)


def test_boolq_takes_examples_from_a_train_file(tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl", [BOOLQ])
    write(tmp_path / "train.jsonl", [{**BOOLQ, "answer": False}])
    (item,) = items("boolq", tmp_path, num_shots=1)
    assert str(item.prompt).startswith("Snow is white.\nQuestion: is snow white?\nAnswer: No\n\nSnow")
    with pytest.raises(UserError, match=r"--num-shots 2: .*holds only 1"):
        items("boolq", tmp_path, num_shots=2)


def test_gsm8k_shows_solutions_and_reads_the_number(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [GSM8K])
    write(tmp_path / "train.jsonl", [GSM8K])
    (item,) = items("gsm8k", tmp_path, num_shots=1)
    assert item.prompt == (
        "Question: 2 and 3?\nAnswer: 2+3=5 It is five thousand. The answer is 5000.\n\nQuestion: 2 and 3?\nAnswer:"
    )
    assert item.answer == "5000" and not item.choices
    for text in ("The answer is 5,000. Then", "so #### 5000", "3 and then $5,000.00", "The answer is: 5000.0\n7"):
        assert read("gsm8k", item, text) == ("5000", True), text
    assert read("gsm8k", item, "The answer is 5. Not 5000") == ("5", False)
    assert read("gsm8k", item, "who knows") == ("", False)


def test_gsm8k_without_a_train_file_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [GSM8K])
    with pytest.raises(UserError, match=r"train.*--num-shots 0"):
        items("gsm8k", tmp_path)
    assert items("gsm8k", tmp_path, num_shots=0)[0].prompt == "Question: 2 and 3?\nAnswer:"


def test_a_broken_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [GSM8K, {**GSM8K, "answer": "no number"}])
    with pytest.raises(UserError, match=r"test.jsonl line 2: the answer does not end with ####"):
        items("gsm8k", tmp_path, num_shots=0)
    (tmp_path / "test.jsonl").write_text('{"question": \n')
    with pytest.raises(UserError, match=r"test.jsonl line 1: not valid JSON"):
        items("gsm8k", tmp_path, num_shots=0)
    write(tmp_path / "test.jsonl", [{"answer": True, "passage": "x"}])
    with pytest.raises(UserError, match=r"test.jsonl line 1: 'question' is missing"):
        items("boolq", tmp_path)


COT = """Do not train on this.
-----
Say yes or no.

Q: Is 1 odd?
Options:
- Yes
A: Let's think step by step.
1 = 2*0 + 1. So the answer is Yes.

Q: Is 2 odd?
A: Let's think step by step.
So the answer is No."""


@pytest.fixture
def bbh(tmp_path: Path) -> Path:
    (tmp_path / "bbh").mkdir()
    rows = {"canary": "x", "examples": [{"input": "Is 3 odd?", "target": "Yes"}, {"input": "Which?", "target": "(B)"}]}
    (tmp_path / "bbh/odd.json").write_text(json.dumps(rows))
    (tmp_path / "cot-prompts").mkdir()
    (tmp_path / "cot-prompts/odd.txt").write_text(COT)
    return tmp_path


def test_bbh_puts_the_authors_examples_before_the_question(bbh: Path) -> None:
    item = items("bbh", bbh)[0]
    assert item.prompt == COT.split("-----\n")[1] + "\n\nQ: Is 3 odd?\nA:"
    assert str(items("bbh", bbh / "bbh", num_shots=0)[0].prompt) == "Say yes or no.\n\nQ: Is 3 odd?\nA:"
    roles = [message.role for message in items("bbh", bbh, num_shots=1, chat=True)[0].prompt]  # type: ignore[union-attr]
    assert roles == ["user", "assistant", "user"]
    with pytest.raises(UserError, match=r"--num-shots 3: .*odd.txt holds only 2"):
        items("bbh", bbh, num_shots=3)


def test_bbh_reads_what_the_answer_is_said_to_be(bbh: Path) -> None:
    yes, letter = items("bbh", bbh)
    assert read("bbh", yes, " Let's think step by step.\n3 = 2+1. So the answer is yes.\n\nThe answer is No.")[1]
    assert read("bbh", yes, "\nYes\nNo")[1] and not read("bbh", yes, "No")[1]
    assert read("bbh", letter, "So the answer is (B).")[1] and read("bbh", letter, "B")[1]


def test_bbh_without_examples_asks_the_question_alone(bbh: Path) -> None:
    (bbh / "cot-prompts/odd.txt").unlink()
    assert items("bbh", bbh)[0].prompt == "Q: Is 3 odd?\nA:"
    with pytest.raises(UserError, match=r"cot-prompts.*--num-shots 0"):
        items("bbh", bbh, num_shots=2)


AGI = {"passage": "P. ", "question": "Which?", "options": ["(A)x", "(B)y", "(C)z"], "label": "B", "answer": None}


def test_agieval_speaks_the_language_of_the_exam(tmp_path: Path) -> None:
    write(tmp_path / "v1/sat-math.jsonl", [AGI])
    write(tmp_path / "v1/gaokao-history.jsonl", [AGI])
    chinese, english = items("agieval", tmp_path)
    assert english.prompt == "P. Q: Which? Answer Choices: (A)x (B)y (C)z\nA: Among A through C, the answer is"
    assert english.choices == {"A": " A", "B": " B", "C": " C"} and english.category == "English"
    assert chinese.prompt == "P. 问题：Which? 选项：(A)x (B)y (C)z\n答案：从A到C, 我们应选择"
    assert chinese.choices["A"] == "A"


def test_an_exam_with_several_right_letters_is_written_as_a_whole(tmp_path: Path) -> None:
    several = {**AGI, "label": ["C", "A"]}
    write(tmp_path / "jec-qa-kd.jsonl", [AGI, several])
    one, two = items("agieval", tmp_path)
    assert not one.choices and not two.choices and two.answer == "AC"
    assert read("agieval", two, "A和C")[1] and not read("agieval", two, "A")[1]
    assert not read("agieval", one, "AB")[1] and read("agieval", one, "(B)y")[1]


def test_agieval_without_choices_compares_the_first_line(tmp_path: Path) -> None:
    write(tmp_path / "math.jsonl", [{**AGI, "options": None, "label": None, "answer": "x^2"}])
    (item,) = items("agieval", tmp_path)
    assert str(item.prompt).endswith("Q: Which? \nA: The answer is")
    assert read("agieval", item, " $x^2$.\nmore")[1]


def test_agieval_takes_examples_from_the_authors_table(tmp_path: Path) -> None:
    write(tmp_path / "v1/sat-en-without-passage.jsonl", [AGI])
    cell = repr({**AGI, "label": "C"}).replace('"', '""')
    (tmp_path / "few_shot_prompts.csv").write_text(f'math,sat-en\n,"{cell}"\n,because\n')
    (item,) = items("agieval", tmp_path)
    assert str(item.prompt).startswith(
        "Q: Which? Answer Choices: (A)x (B)y (C)z\nA: Among A through C, the answer is C\n\n"
    )
    with pytest.raises(UserError, match=r"--num-shots 2: .*holds only 1 for sat-en-without-passage"):
        items("agieval", tmp_path, num_shots=2)


PROBLEM = {
    "task_id": "HumanEval/0", "entry_point": "double",
    "prompt": 'import math\n\ndef double(x):\n    """Twice x."""\n',
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}  # fmt: skip


def test_human_eval_runs_the_tests_on_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress((json.dumps(PROBLEM) + "\n").encode()))
    (item,) = items("human_eval", tmp_path)
    assert item.prompt == PROBLEM["prompt"]
    for text, right in (
        ("    return math.floor(2 * x)\n\ndef other():\n    return (", True),
        ("    return 3 * x\n", False),
        ("Sure:\n```python\ndef double(x):\n    return x + x\n```\nDone.", True),
        ("```python\n    return 2 * x\n```", True),
    ):
        assert read("human_eval", item, text)[1] is right, text


def test_human_eval_can_be_asked_with_a_template(tmp_path: Path) -> None:
    write(tmp_path / "HumanEval.jsonl", [PROBLEM])
    assert items("human_eval", tmp_path, instruction="Do {prompt}!")[0].prompt == f"Do {PROBLEM['prompt']}!"
    (message,) = items("human_eval", tmp_path, chat=True)[0].prompt
    assert PROBLEM["prompt"] in message.content and "code block" in message.content  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"human_eval has no worked examples"):
        items("human_eval", tmp_path, num_shots=1)


def test_the_published_files_are_read() -> None:
    assert len(items("boolq", shared("data/boolq"))) == 300
    found = items("gsm8k", shared("data/gsm8k"))
    assert len(found) == 200 and all(str(item.prompt).count("Question: ") == 6 for item in found)
    assert found[0].answer == "18"
