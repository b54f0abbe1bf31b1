"""AGIEval (Zhong et al. 2023, arXiv:2304.06364): admission and licence exams in English and Chinese, a file each."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.files import Row, find_files, json_rows, read_text
from modellink_lora.evaluation.item import Item, Options, Prompt, Task, conversation
from modellink_lora.evaluation.reading import (
    as_number,
    bare_phrase,
    read_choice,
    read_choices,
    read_number,
    read_phrase,
    same_phrase,
)

DEFAULT_SHOTS = 5
_LETTERS = "ABCDEFG"
_CHINESE = ("gaokao-", "jec-qa-", "logiqa-zh")
_ENGLISH = ("gaokao-english",)
_SHOTS_FILE = "few_shot_prompts.csv"


def items(folder: Path, options: Options) -> list[Item]:
    """The questions of every exam; worked examples come from the authors' few_shot_prompts.csv where it is there."""
    found = []
    for file in find_files(folder, ".jsonl", below=("v1", "v1_1", "data/v1", "data/v1_1"), task="agieval"):
        subject = file.stem
        chinese = subject.startswith(_CHINESE) and subject not in _ENGLISH
        shots = _shots(file, subject, options.num_shots)
        rows = json_rows([file])
        # in an exam where several letters can be right, which questions those are must not show: all are written
        scored = all(_letters(row, chinese) and len(_answer(row, _letters(row, chinese))) == 1 for row in rows)
        gap = "" if options.chat or chinese else " "
        for number, row in enumerate(rows[: options.most]):
            letters = _letters(row, chinese)
            found.append(
                Item(
                    subject, number, _prompt(row, shots, chinese, options.chat), _answer(row, letters),
                    {letter: gap + letter for letter in letters} if scored else {},
                    "Chinese" if chinese else "English",
                )
            )  # fmt: skip
    return found


def _letters(row: Row, chinese: bool) -> str:
    """The letters of the choices; "" without choices."""
    choices = row.values.get("options")
    if not choices:
        return ""
    if not isinstance(choices, list) or len(choices) > len(_LETTERS) or not all(isinstance(c, str) for c in choices):
        raise row.error("'options' is no list of up to 7 choices")
    # a few rows of the original files hold all choices in one text: five in English exams, four in Chinese ones
    return _LETTERS[: len(choices) if len(choices) > 1 else 4 if chinese else 5]


def _answer(row: Row, letters: str) -> str:
    """The right letter, or letters in their order, or the answer of a question without choices."""
    value = row.values.get("label") if letters else row.values.get("answer")
    if isinstance(value, list):
        value = "".join(sorted(map(str, value)))
    if not isinstance(value, str) or not value or (letters and not set(value) <= set(letters)):
        raise row.error(f"the answer is {value!r}, expected {f'letters of {letters}' if letters else 'a text'}")
    return value


def _asked(row: Row, chinese: bool) -> str:
    passage, choices = row.values.get("passage") or "", row.values.get("options")
    last = _letters(row, chinese)[-1:]
    if chinese:
        asked = f"{passage}问题：{row.text('question')} "
        return asked + (f"选项：{' '.join(choices)}\n答案：从A到{last}, 我们应选择" if choices else "\n答案：")
    asked = f"{passage}Q: {row.text('question')} "
    if choices:
        return asked + f"Answer Choices: {' '.join(choices)}\nA: Among A through {last}, the answer is"
    return asked + "\nA: The answer is"


def _prompt(row: Row, shots: Sequence[Row], chinese: bool, chat: bool) -> Prompt:
    pairs = [(_asked(shot, chinese), _answer(shot, _letters(shot, chinese))) for shot in shots]
    if chat:
        return conversation(pairs, _asked(row, chinese))
    gap = "" if chinese else " "
    return "\n\n".join([*(asked + gap + answer for asked, answer in pairs), _asked(row, chinese)])


def _shots(file: Path, subject: str, wanted: int | None) -> list[Row]:
    """Worked examples: every second row of the file is one for each exam, written as a Python dictionary."""
    path = next((p for p in (file.parent / _SHOTS_FILE, file.parent.parent / _SHOTS_FILE) if p.is_file()), None)
    if path is None:
        if wanted:
            raise UserError(
                f"{file.parent.parent / _SHOTS_FILE}: no such file; the {wanted} worked examples of --num-shots come "
                "from it: put it there, or give --num-shots 0"
            )
        return []
    header, *rows = list(csv.reader(io.StringIO(read_text(path))))
    column = subject.removesuffix("-without-passage")
    cells = [row[header.index(column)] for row in rows[::2]] if column in header else []
    found = [Row(_dictionary(cell, path), path, 1) for cell in cells if cell.strip()]
    if column != subject:
        found = [Row({**row.values, "passage": None}, path, 1) for row in found]
    if wanted is not None and wanted > len(found):
        raise UserError(f"--num-shots {wanted}: {path} holds only {len(found)} for {subject}; give at most that many")
    return found[: DEFAULT_SHOTS if wanted is None else wanted]


def _dictionary(cell: str, path: Path) -> dict[str, Any]:
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {cell[:40]!r} is no example in braces")
    return value


def read(item: Item, text: str) -> str:
    """The letter, or the letters where several can be right; of a question without choices, a number or a text."""
    if re.fullmatch(r"[A-G]+", item.answer):
        return read_choice(text, "".join(item.choices)) if item.choices else read_choices(text, _LETTERS)
    return (read_number(text) if as_number(item.answer) else "") or read_phrase(text)


def _equal(prediction: str, item: Item) -> bool:
    return same_phrase(prediction, bare_phrase(item.answer))


TASK = Task("agieval", "AGIEval", items, read, judge=_equal, stop=("\n\nQ:", "\n\n问题"))
