"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): school mathematics in words; the number at the end counts."""

from __future__ import annotations

import re
from pathlib import Path

from modellink_lora.evaluation.files import Row, json_rows, split_files, train_shots
from modellink_lora.evaluation.item import Item, Options, Prompt, Task, conversation
from modellink_lora.evaluation.reading import as_number, read_number

DEFAULT_SHOTS = 5
_SAYS = "The answer is"


def items(folder: Path, options: Options) -> list[Item]:
    """The questions of the test files; worked examples are the first rows of a train file, with their solutions."""
    files, train = split_files(folder, task="gsm8k")
    wanted = DEFAULT_SHOTS if options.num_shots is None else options.num_shots
    shots = train_shots(train, wanted, folder=folder, task="gsm8k")
    return [
        Item("gsm8k", number, _prompt(row, shots, options.chat), _solution(row)[1])
        for number, row in enumerate(json_rows(files)[: options.most])
    ]


def _asked(row: Row) -> str:
    return f"Question: {row.text('question')}\nAnswer:"


_CALCULATOR = re.compile(r"<<[^<>]*>>")  # notes for a calculator that the authors' model had


def _solution(row: Row) -> tuple[str, str]:
    """(the steps, the number) of a row; a row's answer ends with `#### NUMBER`."""
    steps, mark, number = row.text("answer").rpartition("####")
    if not mark or not as_number(number):
        raise row.error("the answer does not end with #### and a number")
    return " ".join(_CALCULATOR.sub("", steps).split()), as_number(number)


def _worked(row: Row) -> str:
    steps, number = _solution(row)
    return f"{steps} {_SAYS} {number}."


def _prompt(row: Row, shots: list[Row], chat: bool) -> Prompt:
    if chat:
        return conversation([(_asked(shot), _worked(shot)) for shot in shots], _asked(row))
    return "\n\n".join([*(f"{_asked(shot)} {_worked(shot)}" for shot in shots), _asked(row)])


def read(item: Item, text: str) -> str:
    return read_number(text)


TASK = Task("gsm8k", "gsm8k", items, read, stop=("\n\nQuestion:", "\nQuestion:"), max_new_tokens=512)
