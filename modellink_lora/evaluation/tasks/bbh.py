"""BIG-Bench Hard (Suzgun et al. 2022, arXiv:2210.09261): one JSON file a subject, worked examples in cot-prompts/."""

from __future__ import annotations

import re
from pathlib import Path

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.files import Row, find_files, json_file, read_text
from modellink_lora.evaluation.item import Item, Options, Prompt, Task, conversation
from modellink_lora.evaluation.reading import (
    as_number,
    bare_phrase,
    read_choice,
    read_number,
    read_phrase,
    read_word,
    same_phrase,
)


def items(folder: Path, options: Options) -> list[Item]:
    """The examples of every file; those worked out by the authors stand before them where their file is there."""
    found = []
    for file in find_files(folder, ".json", below=("bbh", "data"), task="bbh"):
        subject = file.stem
        introduction, shots = _worked(file, subject, options.num_shots)
        rows = json_file(file).get("examples")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'{file}: holds no list "examples" of objects')
        for number, values in enumerate(rows[: options.most]):
            row = Row(values, file, 1)
            try:
                question, answer = row.text("input"), row.text("target")
            except UserError:
                raise UserError(f"{file}: example {number} lacks the text of its input or target") from None
            found.append(
                Item(subject, number, _prompt(introduction, shots, question, options.chat), bare_phrase(answer))
            )
    return found


_RULE = re.compile(r"^-+\s*$", re.MULTILINE)


def _worked(file: Path, subject: str, wanted: int | None) -> tuple[str, list[tuple[str, str]]]:
    """(what introduces the subject, worked examples) of `cot-prompts/SUBJECT.txt` beside the folder of `file`.

    Args:
        wanted: so many of them; None takes those there are.
    """
    path = next((p for p in (file.parent.parent / "cot-prompts" / f"{subject}.txt",
                             file.parent / "cot-prompts" / f"{subject}.txt") if p.is_file()), None)  # fmt: skip
    if path is None:
        if wanted:
            raise UserError(
                f"{file.parent.parent / 'cot-prompts' / subject}.txt: no such file; the {wanted} worked examples of "
                "--num-shots come from it: put the folder cot-prompts beside that of the questions, or give "
                "--num-shots 0"
            )
        return "", []
    text = _RULE.split(read_text(path), maxsplit=1)[-1].strip()  # above the rule stands a warning not to train on it
    introduction, *parts = re.split(r"(?:^|\n\n)Q: ", text)
    shots = []
    for part in parts:
        question, mark, answer = part.partition("\nA: ")
        if not mark:
            raise UserError(f"{path}: the example {question[:40]!r} has no line that begins with 'A: '")
        shots.append((question, answer.strip()))
    if wanted is not None and wanted > len(shots):
        raise UserError(f"--num-shots {wanted}: {path} holds only {len(shots)}; give at most that many")
    return introduction, shots[:wanted]


def _prompt(introduction: str, shots: list[tuple[str, str]], question: str, chat: bool) -> Prompt:
    asked = [f"Q: {text}\nA:" for text in (*(q for q, _ in shots), question)]
    if chat:
        if introduction:
            asked[0] = f"{introduction}\n\n{asked[0]}"
        return conversation([(text, answer) for text, (_, answer) in zip(asked, shots)], asked[-1])
    worked = [f"{text} {answer}" for text, (_, answer) in zip(asked, shots)]
    return "\n\n".join([*filter(None, [introduction]), *worked, asked[-1]])


_WORDS = ({"yes": "yes", "no": "no"}, {"true": "true", "false": "false"}, {"valid": "valid", "invalid": "invalid"})
_LETTERS = "ABCDEFGHIJKLMNOPQR"


def read(item: Item, text: str) -> str:
    """A letter, a number, one of two words, or a text, as the right answer is one; else what is said, as it is."""
    answer, found = item.answer.lower(), ""
    if re.fullmatch("[a-r]", answer):
        found = read_choice(text, _letters(item) or _LETTERS)
    elif as_number(answer):
        found = read_number(text)
    elif words := next((words for words in _WORDS if answer in words), None):
        found = read_word(text, words)
    return found or read_phrase(text)


def _letters(item: Item) -> str:
    """The letters of the question's choices, of which each begins a line, `(A) ..`."""
    asked = item.prompt if isinstance(item.prompt, str) else item.prompt[-1].content
    return "".join(sorted(set(re.findall(r"^\(([A-R])\)", asked.rpartition("Q: ")[2], re.MULTILINE))))


def _equal(prediction: str, item: Item) -> bool:
    return same_phrase(prediction, item.answer)


TASK = Task("bbh", "bbh", items, read, judge=_equal, stop=("\n\nQ:", "\nQ:"), max_new_tokens=512)
