"""Exams of questions with four choices, which mmlu, cmmlu and ceval share: files, prompts and reading the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.files import Row, csv_rows, find_files, first_shots
from modellink_lora.evaluation.item import Item, Options, Prompt, conversation
from modellink_lora.evaluation.reading import read_choice

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", *(letter.lower() for letter in LETTERS), "answer")
DEFAULT_SHOTS = 5


@dataclass(frozen=True)
class Layout:
    """How the files of an exam are named.

    Args:
        test, dev: endings behind the subject's name.
        below: folders in which the test files may lie below the one that is given.
        header: whether the first row names the columns.
    """

    test: str
    dev: str
    below: tuple[str, ...]
    header: bool


@dataclass(frozen=True)
class Wording:
    """The texts around a question, plain and in a conversation.

    Args:
        header: before the first example; {subject} is the exam's name.
        question: before each question of a plain prompt.
        answer: between the choices and the letter of a plain prompt.
        gap: between `answer` and the letter.
        chat_answer: what ends the question in a conversation.
    """

    header: str
    chat_header: str
    question: str
    answer: str
    gap: str
    chat_answer: str


_ZH_HEADER = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。"
WORDINGS = {
    # two blanks before the subject in plain prompts, as in the prompts of the benchmark's authors
    "en": Wording(
        header="The following are multiple choice questions (with answers) about  {subject}.",
        chat_header="The following are multiple choice questions (with answers) about {subject}.\n\n",
        question="",
        answer="\nAnswer:",
        gap=" ",
        chat_answer="\nAnswer: ",
    ),
    "zh": Wording(
        header=_ZH_HEADER,
        chat_header=_ZH_HEADER + "\n\n",
        question="问：",
        answer="\n答：",
        gap="",
        chat_answer="\n答案：",
    ),
}


def exam_items(
    folder: Path,
    options: Options,
    *,
    task: str,
    layout: Layout,
    language: str,
    names: Mapping[str, str],
    categories: Mapping[str, str],
) -> list[Item]:
    """The questions of every subject in `folder`.

    Args:
        language: of the data; `options.language` overrides it.
        names: subject -> its name in the header, in the language of the data.
        categories: subject -> group of subjects that results are summed up for.
    """
    chosen = options.language or language
    wording = WORDINGS[chosen]
    wanted = DEFAULT_SHOTS if options.num_shots is None else options.num_shots
    items = []
    for file in find_files(folder, layout.test, below=layout.below, task=task):
        subject = file.name.removesuffix(layout.test)
        name = names.get(subject, "") if chosen == language else ""
        name = name or subject.replace("_", " ")
        shots = _shots(file, subject, wanted, layout)
        rows = csv_rows(file, COLUMNS, header=layout.header)[: options.most]
        make = _chat if options.chat else _plain
        for number, row in enumerate(rows):
            answer = _letter(row)
            prompt = make(name, shots, row, wording)
            gap = "" if options.chat else wording.gap
            items.append(
                Item(
                    subject, number, prompt, answer, {letter: gap + letter for letter in LETTERS},
                    categories.get(subject, "other" if categories else None),
                )
            )  # fmt: skip
    return items


def _shots(file: Path, subject: str, wanted: int, layout: Layout) -> list[Row]:
    if wanted == 0:
        return []
    dev = file.parent.parent / "dev" / f"{subject}{layout.dev}"
    if not dev.is_file():
        dev_beside = file.parent / "dev" / f"{subject}{layout.dev}"
        if not dev_beside.is_file():
            raise UserError(
                f"{dev}: no such file; the {wanted} worked examples of --num-shots come from it: put the folder dev "
                "beside that of the test files, or give --num-shots 0"
            )
        dev = dev_beside
    return first_shots(csv_rows(dev, COLUMNS, header=layout.header), wanted, where=dev)


def _letter(row: Row) -> str:
    answer = row.text("answer").strip().upper()
    if answer not in LETTERS:
        raise row.error(f"the answer is {row.values['answer']!r}, expected one of {', '.join(LETTERS)}")
    return answer


def _asked(row: Row) -> str:
    return row.text("question") + "".join(f"\n{letter}. {row.text(letter.lower())}" for letter in LETTERS)


def _plain(name: str, shots: Sequence[Row], row: Row, wording: Wording) -> Prompt:
    def asked(row: Row) -> str:
        return wording.question + _asked(row) + wording.answer

    examples = [asked(shot) + wording.gap + _letter(shot) for shot in shots]
    return "\n\n".join([wording.header.format(subject=name), *examples, asked(row)])


def _chat(name: str, shots: Sequence[Row], row: Row, wording: Wording) -> Prompt:
    asked = [_asked(each) + wording.chat_answer for each in (*shots, row)]
    asked[0] = wording.chat_header.format(subject=name) + asked[0]
    return conversation([(text, _letter(shot)) for text, shot in zip(asked, shots)], asked[-1])


def read_letter(item: Item, text: str) -> str:
    return read_choice(text, "".join(item.choices))
