"""Streamed text never takes anything back, ends at stop texts, and adds up to what decoding all tokens gives."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from modellink_lora.inference.text import TextStream
from tests.helpers.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("bytes")))


def test_characters_of_several_tokens_come_whole(tokenizer: object) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(byte)[0] for byte in "né 你好".encode()]
    assert pieces == ["n", "", "é", " ", "", "", "你", "", "", "好"]
    assert stream.end() == "" and stream.text == "né 你好"


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizer: object) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(byte)[0] for byte in "a你".encode()[:-1]] == ["a", "", ""]
    assert stream.end() == "\ufffd"


def test_nothing_of_a_stop_text_is_shown(tokenizer: object) -> None:
    stream = TextStream(tokenizer, ["\n\nQ:", "END"])
    shown = [stream.push(byte) for byte in b"one\n\ntwo E\n\nQ: three"[: len(b"one\n\ntwo E\n\nQ:")]]
    assert "".join(text for text, _ in shown) == "one\n\ntwo E"
    assert [stopped for _, stopped in shown] == [False] * (len(shown) - 1) + [True]


def test_what_only_looked_like_a_stop_text_is_shown(tokenizer: object) -> None:
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(byte)[0] for byte in b"xENx"] == ["x", "", "", "ENx"]
    assert stream.push(ord("E"))[0] == "" and stream.end() == "E"


def test_the_earliest_of_two_stop_texts_wins(tokenizer: object) -> None:
    stream = TextStream(tokenizer, ["r", "later"])
    assert [stream.push(byte) for byte in b"a later"][-2:] == [("", False), ("", True)]
    assert stream.text == "a "
