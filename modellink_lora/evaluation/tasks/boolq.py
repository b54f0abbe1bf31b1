"""BoolQ (Clark et al. 2019, arXiv:1905.10044): yes-or-no questions about a passage, as JSON lines."""

from __future__ import annotations

from pathlib import Path

from modellink_lora.evaluation.files import Row, json_rows, split_files, train_shots
from modellink_lora.evaluation.item import Item, Options, Prompt, Task, conversation
from modellink_lora.evaluation.reading import YES_NO, read_word

_CHOICES = {"Yes": " Yes", "No": " No"}
_CHAT_CHOICES = {"Yes": "Yes", "No": "No"}


def items(folder: Path, options: Options) -> list[Item]:
    """The questions of the test files, else of the dev files; worked examples are the first rows of a train file."""
    files, train = split_files(folder, task="boolq")
    shots = train_shots(train, options.num_shots or 0, folder=folder, task="boolq")
    choices = _CHAT_CHOICES if options.chat else _CHOICES
    return [
        Item("boolq", number, _prompt(row, shots, options.chat), _answer(row), choices)
        for number, row in enumerate(json_rows(files)[: options.most])
    ]


def _asked(row: Row) -> str:
    return f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"


def _answer(row: Row) -> str:
    answer = row.values.get("answer")
    if not isinstance(answer, bool):
        raise row.error(f"the answer is {answer!r}, expected true or false")
    return "Yes" if answer else "No"


def _prompt(row: Row, shots: list[Row], chat: bool) -> Prompt:
    if chat:
        return conversation([(_asked(shot), _answer(shot)) for shot in shots], _asked(row))
    return "\n\n".join([*(f"{_asked(shot)} {_answer(shot)}" for shot in shots), _asked(row)])


def read(item: Item, text: str) -> str:
    return read_word(text, YES_NO)


TASK = Task("boolq", "boolq", items, read)
