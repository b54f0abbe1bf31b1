"""The chat's loop over a scripted engine: what Ctrl-C stops, and what is remembered of an answer."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from modellink_lora.config.infer import InferConfig
from modellink_lora.inference.chat import Chat
from modellink_lora.inference.request import Request, Token


class Scripted:
    """Answers every question with `one two three`; Ctrl-C is pressed after `interrupt` tokens."""

    choices = ("tuned",)
    max_length = 100

    def __init__(self, interrupt: int = 99) -> None:
        self.interrupt, self.asked, self.closed = interrupt, [], 0

    def stream(self, request: Request) -> Iterator[Token]:
        self.asked.append(request)
        try:
            for number, word in enumerate(("one ", "two ", "three")):
                if number == self.interrupt:
                    signal.raise_signal(signal.SIGINT)
                yield Token(number, word, 0.0, finish="stop" if number == 2 else None)
        finally:
            self.closed += 1


PROMPTER = SimpleNamespace(has_template=False, stop_ids=frozenset(), text=lambda text: list(text.encode()))


def talk(engine: Any, *lines: str | BaseException, **flags: Any) -> str:
    waiting = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    Chat(InferConfig(**flags), engine, PROMPTER, seed=5, console=Console(file=out)).run(read)
    return out.getvalue()


def test_ctrl_c_stops_an_answer_which_is_remembered_as_far_as_it_went() -> None:
    engine, former = Scripted(interrupt=1), signal.getsignal(signal.SIGINT)
    said = talk(engine, "a", "b")
    assert "ModelLink: one two  [stopped]\n" in said and "three" not in said and engine.closed == 2
    assert bytes(engine.asked[1].ids) == b"aone two b"
    assert signal.getsignal(signal.SIGINT) is former


def test_ctrl_c_at_the_prompt_and_the_end_of_the_input_end_the_chat() -> None:
    for end in (KeyboardInterrupt(), EOFError()):
        engine = Scripted()
        talk(engine, "a", end, "b")
        assert len(engine.asked) == 1


def test_commands_are_no_questions_but_a_path_is() -> None:
    engine = Scripted()
    talk(engine, "", "/help", "NEW", "/usr/bin is what?", "q", "never")
    assert [bytes(request.ids) for request in engine.asked] == [b"/usr/bin is what?"]


def test_both_sides_keep_conversations_of_their_own_and_every_answer_its_seed() -> None:
    engine = Scripted()
    talk(engine, "a", "/both", "b", "/adapter tuned 0.5", "c", adapter_scale=2.0)
    assert [bytes(request.ids) for request in engine.asked] == [
        b"a",
        b"b",
        b"aone two threeb",
        b"aone two threebone two threec",
    ]
    assert [(r.choice.adapter, r.choice.scale) for r in engine.asked] == [
        ("tuned", 2),
        ("base", 1),
        ("tuned", 2),
        ("tuned", 0.5),
    ]
    assert [request.sampling.seed for request in engine.asked] == [5, 6, 7, 8]
