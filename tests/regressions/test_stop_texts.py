"""Stop texts that are special tokens, begin or end in one, or span tokens: they end an answer and are never shown.

Looked for after special tokens were left out, they were never found: vllm-project/vllm#2123, LostRuins/koboldcpp#791
(`<|im_start|>user` as a stop text), lm-sys/FastChat#2083.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import AutoTokenizer

from modellink_lora.inference.text import TextStream, holds_stop, visible_text
from tests.helpers.tiny_tokenizer import CHATML, make_byte_fallback_tokenizer, make_tokenizer

Parts = Sequence[str]  # of an answer, in order: texts, and special tokens as a whole


@pytest.fixture(scope="module", params=[make_tokenizer, make_byte_fallback_tokenizer])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(request.param(tmp_path_factory.mktemp("tokenizer")))


def ids_of(tokenizer: Any, parts: Parts) -> list[int]:
    """Token ids of an answer; a text in the middle of one gets no blank in front, as none is generated there."""
    ids = []
    for part in parts:
        if part in CHATML:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return [int(id) for id in ids]


def shown(tokenizer: Any, ids: Sequence[int], stop: Parts, last: int | None = None) -> tuple[str, bool]:
    """What a client has seen in the end, and whether a stop text ended it. Nothing is ever taken back."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped:
            assert stream.text == "".join(pieces)
            return stream.text, True
    return "".join([*pieces, stream.end(last)]), False


@pytest.mark.parametrize(
    ("parts", "stop", "expected"),
    [
        (["Hi there", "<|im_end|>", "tail"], "<|im_end|>", "Hi there"),
        (["<|im_end|>", "tail"], "<|im_end|>", ""),
        (["Hi", "<|im_start|>", "user", "tail"], "<|im_start|>user", "Hi"),
        (["Hi", "<|im_start|>", "useless"], "<|im_start|>user", None),
        (["Hi", "<|im_start|>", "tool", "<|im_start|>", "user"], "<|im_start|>user", "Hitool"),
        (["Hi\n", "<|im_end|>", "tail"], "\n<|im_end|>", "Hi"),
        (["Hi\n", "tail"], "\n<|im_end|>", None),
        (["Hi", "<|im_end|>", "\n", "<|im_start|>", "user"], "<|im_end|>\n<|im_start|>", "Hi"),
        (["Hi", "<|im_end|>", "tail"], "end|>tail", "Hi"),
        (["Hi there", "<|im_end|>", "tail"], "here<|im", "Hi t"),
        (["a", "<|im_start|>", "EN", "<|im_end|>", "D"], "END", "a"),  # as a client would see it
        (["né", "<|im_start|>", "你好"], "你好", "né"),
        (["né", "<|im_start|>", "你好"], "好", "né你"),
        (["né你", "<|im_start|>", "x"], "<|im_start|>x", "né你"),
        (["😀", "<|im_start|>", "xy"], "pt|>xy", None),
        (["😀", "<|im_start|>", "xy"], "rt|>xy", "😀"),
    ],
)
def test_a_stop_text_ends_the_answer_before_its_first_character(
    tokenizer: Any, parts: Parts, stop: str, expected: str | None
) -> None:
    ids = ids_of(tokenizer, parts)
    plain = "".join(part for part in parts if part not in CHATML)
    assert shown(tokenizer, ids, [stop]) == ((plain, False) if expected is None else (expected, True))
    assert visible_text(tokenizer, ids, [stop]) == (plain if expected is None else expected)
    assert holds_stop(tokenizer, ids, [stop]) == (expected is not None)


def test_the_token_that_ends_an_answer_can_complete_a_stop_text(tokenizer: Any) -> None:
    end = int(tokenizer.eos_token_id)
    assert shown(tokenizer, ids_of(tokenizer, ["so\n"]), ["\n</s>"], end) == ("so", False)
    assert shown(tokenizer, ids_of(tokenizer, ["so\n"]), ["\n</s>x"], end) == ("so\n", False)


def test_any_piece_of_any_answer_is_a_stop_text_of_it(tokenizer: Any) -> None:
    choose = random.Random(5)
    for _ in range(300):
        parts = ["x"]
        for _ in range(choose.randrange(1, 8)):
            word = "".join(choose.choice("ab né你😀\n") for _ in range(choose.randrange(1, 5)))
            parts.append(choose.choice([word, *CHATML]))
        ids = ids_of(tokenizer, parts)
        # each character of the raw text, and whether it is shown
        raw = [(character, part not in CHATML) for part in parts for character in part]
        text = "".join(character for character, _ in raw)
        visible = "".join(character for character, is_shown in raw if is_shown)
        begin = choose.randrange(len(text))
        stop = [text[begin : begin + choose.randrange(1, 9)], "né你x"]
        ends = [sum(is_shown for _, is_shown in raw[: text.find(one)]) for one in stop if one in text]
        ends += [visible.find(one) for one in stop if one in visible]
        assert shown(tokenizer, ids, stop) == (visible[: min(ends)], True), (parts, stop)
        assert visible_text(tokenizer, ids, stop) == visible[: min(ends)], (parts, stop)


def test_without_stop_texts_special_tokens_are_left_out_as_ever(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, ["Hi ", "<|im_start|>", "né", "<|im_end|>"])
    assert shown(tokenizer, ids, []) == ("Hi né", False) and visible_text(tokenizer, ids) == "Hi né"
