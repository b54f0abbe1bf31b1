"""Exams of four choices: which files are found, how their rows are read, and the prompts letter by letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.evaluate import EvalConfig
from modellink_lora.evaluation.index import TASKS
from modellink_lora.evaluation.item import Item, Options
from modellink_lora.evaluation.runner import read_items
from modellink_lora.evaluation.tasks import ceval, cmmlu, mmlu
from tests.helpers.shared import shared

MMLU_DEV = "One?,1,2,3,4,A\nTwo?,1,2,3,4,B\nThree?,1,2,3,4,C\n"
MMLU_TEST = '"He said ""no"",\nand left?",x,"y, z",u,v,D\nSecond?,a,b,c,d,A\n'
ZH_HEADER = ",Question,A,B,C,D,Answer\n"


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    for name, text in (("dev/us_history_dev.csv", MMLU_DEV), ("test/us_history_test.csv", MMLU_TEST)):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(text)
    return tmp_path


@pytest.fixture
def chinese(tmp_path: Path) -> Path:
    for folder, rows in (("dev", "0,一？,甲,乙,丙,丁,C\n"), ("test", "0,二？,子,丑,寅,卯,B\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "agronomy.csv").write_text(ZH_HEADER + rows, encoding="utf-8-sig")
    return tmp_path


def items(task: str, folder: Path | str, **options: object) -> list[Item]:
    return TASKS[task].items(Path(folder), Options(**options))  # type: ignore[arg-type]


def test_a_plain_prompt_of_mmlu(exam: Path) -> None:
    first = items("mmlu", exam / "data/test", num_shots=2)[0]
    assert first.prompt == (
        "The following are multiple choice questions (with answers) about  us history.\n\n"
        "One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
        "Two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        'He said "no",\nand left?\nA. x\nB. y, z\nC. u\nD. v\nAnswer:'
    )
    assert first.answer == "D" and first.choices == {"A": " A", "B": " B", "C": " C", "D": " D"}


def test_a_conversation_of_mmlu(exam: Path) -> None:
    messages = items("mmlu", exam / "data/test", num_shots=1, chat=True)[1].prompt
    assert [(message.role, message.content) for message in messages] == [  # type: ignore[union-attr]
        ("user", "The following are multiple choice questions (with answers) about us history.\n\n"
                 "One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: "),
        ("assistant", "A"),
        ("user", "Second?\nA. a\nB. b\nC. c\nD. d\nAnswer: "),
    ]  # fmt: skip


def test_prompts_in_chinese_name_the_subject_in_chinese(chinese: Path) -> None:
    item = items("cmmlu", chinese, num_shots=1)[0]
    assert item.prompt == (
        "以下是中国关于农学考试的单项选择题，请选出其中的正确答案。\n\n"
        "问：一？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答：C\n\n问：二？\nA. 子\nB. 丑\nC. 寅\nD. 卯\n答："
    )
    assert item.choices["A"] == "A" and item.category == "other"
    chat = items("cmmlu", chinese, num_shots=0, chat=True)[0].prompt
    assert chat[0].content == (  # type: ignore[union-attr]
        "以下是中国关于农学考试的单项选择题，请选出其中的正确答案。\n\n二？\nA. 子\nB. 丑\nC. 寅\nD. 卯\n答案："
    )


def test_the_language_of_the_prompts_can_be_chosen(chinese: Path) -> None:
    prompt = items("cmmlu", chinese, num_shots=0, language="en")[0].prompt
    assert str(prompt).startswith("The following") and str(prompt).endswith("二？\nA. 子\nB. 丑\nC. 寅\nD. 卯\nAnswer:")
    assert "about  agronomy." in str(prompt)


@pytest.mark.parametrize("place", ["data/test", "data/test/", "data", "."])
def test_the_folder_of_the_test_files_is_found_from_above_and_with_a_slash(exam: Path, place: str) -> None:
    assert [item.answer for item in items("mmlu", f"{exam}/{place}", num_shots=0)] == ["D", "A"]


def test_the_folder_may_be_the_one_the_user_is_in(exam: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exam / "data/test")
    config = EvalConfig(task=("mmlu",), task_data_path=(".",), num_shots=3)
    assert len(read_items(config, EngineConfig())["mmlu"]) == 2


def test_a_repeated_header_of_mmlu_is_left_out(exam: Path) -> None:
    file = exam / "data/test/us_history_test.csv"
    file.write_text("question,A,B,C,D,answer\n" + MMLU_TEST)
    assert len(items("mmlu", exam, num_shots=0)) == 2


def test_ceval_reads_its_validation_files(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/law_val.csv").write_text("id,question,A,B,C,D,answer\n0,问题,1,2,3,4,c\n", encoding="utf-8")
    (item,) = items("ceval", tmp_path, num_shots=0)
    assert (item.subject, item.answer, item.category) == ("law", "C", "humanities")
    assert "关于法学考试" in str(item.prompt)


def test_only_the_first_questions_of_each_subject_are_taken(exam: Path) -> None:
    (exam / "data/test/virology_test.csv").write_text(MMLU_TEST)
    found = items("mmlu", exam, num_shots=0, most=1)
    assert [(item.subject, item.number) for item in found] == [("us_history", 0), ("virology", 0)]


@pytest.mark.parametrize(
    ("row", "line", "said"),
    [
        ("Q?,1,2,3,A\n", 4, "5 columns, expected 6"),
        ("Q?,1,2,3,4,E\n", 4, "'E', expected one of A, B, C, D"),
        ('"Q?,1,2,3,4,A\n', 4, "broken CSV"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(exam: Path, row: str, line: int, said: str) -> None:
    file = exam / "data/test/us_history_test.csv"
    file.write_text(MMLU_TEST + row)  # the first row of MMLU_TEST is two lines long
    with pytest.raises(UserError, match=rf"us_history_test.csv line {line}: .*{said}"):
        items("mmlu", exam, num_shots=0)


def test_more_examples_than_there_are_is_an_error_with_both_numbers(exam: Path) -> None:
    with pytest.raises(UserError, match=r"--num-shots 5: .*us_history_dev.csv holds only 3"):
        items("mmlu", exam)


def test_a_missing_dev_folder_is_an_error_that_says_what_to_do(exam: Path) -> None:
    (exam / "data/dev").rename(exam / "data/elsewhere")
    with pytest.raises(UserError, match=r"dev/us_history_dev.csv: no such file.*--num-shots 0"):
        items("mmlu", exam)


def test_a_folder_without_files_and_a_header_without_columns_are_errors(exam: Path, chinese: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*_val.csv for --task ceval \(looked in "):
        items("ceval", exam)
    (chinese / "test/agronomy.csv").write_text("0,二？,子,丑,寅,卯,B\n")
    with pytest.raises(UserError, match=r"agronomy.csv line 1: the header lacks question"):
        items("cmmlu", chinese, num_shots=0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" B", "B"), ("\nC. because", "C"), ("The answer is D.", "D"), ("Dogs", ""), ("no idea", ""), ("", "")],
)
def test_the_letter_of_a_written_answer(exam: Path, text: str, letter: str) -> None:
    item = items("mmlu", exam, num_shots=0)[0]
    assert TASKS["mmlu"].read(item, text) == letter


def test_every_subject_has_one_category() -> None:
    counts = {task: len(module.CATEGORIES) for task, module in (("mmlu", mmlu), ("cmmlu", cmmlu), ("ceval", ceval))}
    assert counts == {"mmlu": 57, "cmmlu": 67, "ceval": 52}
    sizes = {category: list(mmlu.CATEGORIES.values()).count(category) for category in set(mmlu.CATEGORIES.values())}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}  # those of the paper


def test_the_published_files_are_read() -> None:
    found = items("mmlu", shared("data/mmlu/data/test"))
    assert len(found) == 100 + 152 + 100 + 198 + 112 + 234
    assert len(items("cmmlu", shared("data/cmmlu"))) == 169 + 136 + 105 + 171
