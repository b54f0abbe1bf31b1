"""What all benchmarks have in common: a question with its prompt, and a task that makes and judges them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from modellink_lora.data.prompt import Message

Prompt = str | tuple[Message, ...]  # a text to be continued, or a conversation that ends with the question


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        number: its place in the subject, from 0.
        answer: what is right, in the form in which a task reads predictions.
        choices: answer -> the text it is written as after the prompt. Without choices the answer is generated.
    """

    subject: str
    number: int
    prompt: Prompt
    answer: str
    choices: Mapping[str, str] = field(default_factory=dict)
    category: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything the model is shown and measured by."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Options:
    """What the user says about prompts.

    Args:
        num_shots: worked examples; None takes the task's own number.
        chat: prompts are conversations, because a template stands around them.
        language: None takes that of the data.
        most: questions of each subject; None takes all.
    """

    num_shots: int | None = None
    chat: bool = False
    language: str | None = None
    most: int | None = None
    instruction: str | None = None


def _equal(prediction: str, item: Item) -> bool:
    return prediction == item.answer


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        title: its name in the log lines.
        items: the questions in a folder. Raises UserError naming what is missing or broken, and where.
        read: the prediction in a written answer; "" where there is none.
        judge: whether a prediction is right.
        stop: texts at which a written answer to a plain prompt ends.
        languages: those --eval-language may choose.
    """

    name: str
    title: str
    items: Callable[[Path, Options], list[Item]]
    read: Callable[[Item, str], str]
    judge: Callable[[str, Item], bool] = _equal
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128
    languages: tuple[str, ...] = ()
    runs_code: bool = False


def conversation(shots: Sequence[tuple[str, str]], question: str) -> tuple[Message, ...]:
    """Worked examples as turns, then the question."""
    turns = [m for asked, answer in shots for m in (Message("user", asked), Message("assistant", answer))]
    return (*turns, Message("user", question))
