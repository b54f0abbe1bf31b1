"""What a conversation remembers: the newest turns, within the model's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.inference.history import History


class Letters:
    """One token a letter; messages as `role:text|`."""

    def text(self, prompt: str) -> list[int]:
        return [ord(letter) for letter in prompt]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.text("".join(f"{message['role'][0]}:{message['content']}|" for message in messages))


def asked(history: History, question: str, *, longest: int = 1000, told: list[str] | None = None) -> str:
    ids = history.ask(question, longest=longest, tell=(told if told is not None else []).append)
    return "".join(map(chr, ids))


@pytest.mark.parametrize("as_messages", [True, False])
def test_beyond_its_turns_the_oldest_is_forgotten(as_messages: bool) -> None:
    history = History(Letters(), turns=3, as_messages=as_messages)
    for number in range(5):
        asked(history, f"q{number}")
        history.add(f"q{number}", f"a{number}")
    expected = "u:q3|a:a3|u:q4|a:a4|u:q5|" if as_messages else "q3a3q4a4q5"
    assert asked(history, "q5") == expected
    assert len(history.pairs) == 2, "with the answer to come there are 2 x 3 messages"


def test_what_no_longer_fits_is_left_out_oldest_first_and_told() -> None:
    history, told = History(Letters(), turns=5, as_messages=False), []
    history.pairs = [("aaaa", "bbbb"), ("cc", "dd"), ("e", "f")]
    assert asked(history, "?", longest=7, told=told) == "ccddef?"
    assert told == ["the conversation no longer fits into the model: 1 of its oldest turns left out"]
    assert asked(history, "?", longest=7, told=told) == "ccddef?" and len(told) == 1, "it is not told again"


def test_a_question_that_is_too_long_by_itself_is_refused_and_nothing_is_forgotten() -> None:
    history = History(Letters(), turns=3, as_messages=False, pairs=[("a", "b")])
    with pytest.raises(UserError, match="this question has 9 tokens, the model has room for 8"):
        asked(history, "123456789", longest=8)
    assert history.pairs == [("a", "b")]
