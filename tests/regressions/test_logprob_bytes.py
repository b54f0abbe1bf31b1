"""Log-probabilities of tokens that are parts of characters carry the tokens' own bytes, and none hides another.

Bytes of U+FFFD instead: ollama/ollama#13497. Alternatives merged because they have one text: sgl-project/sglang#32290.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from modellink_lora.inference.api_answer import Writer
from modellink_lora.inference.api_request import Asked
from modellink_lora.inference.request import Token
from modellink_lora.inference.text import TextStream
from modellink_lora.inference.token_bytes import token_bytes
from tests.helpers.shared import shared
from tests.helpers.tiny_tokenizer import make_byte_fallback_tokenizer, make_tokenizer

KINDS = [make_tokenizer, make_byte_fallback_tokenizer, "smollm2-bpe-49k", "mistral-v1-32k"]
TEXTS = ["Hi 😀 there", "né  two   blanks", " 你好 ", "a\n\n  b\t¼", "😀", "▁ĠÂ<0x41>"]


@pytest.fixture(scope="module", params=KINDS, ids=lambda made: getattr(made, "__name__", made))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if isinstance(request.param, str):
        return AutoTokenizer.from_pretrained(shared(f"models/tokenizers/{request.param}"))
    return AutoTokenizer.from_pretrained(request.param(tmp_path_factory.mktemp("tokenizer")))


def answer(tokenizer: Any, tokens: Sequence[Token], *, chat: bool, stream: bool = False) -> dict[str, Any]:
    """The one choice of the server's answer with these tokens, its pieces joined if they were streamed."""
    writer = Writer(Asked("base", chat, ((),), 1, 5, stream, False), token_bytes(tokenizer))  # type: ignore[arg-type]
    if not stream:
        for token in tokens:
            writer.add(0, token)
        return json.loads(json.dumps(writer.whole()))["choices"][0]  # type: ignore[no-any-return]
    pieces = [chunk["choices"][0]["logprobs"] for token in tokens for chunk in writer.piece(0, token)]
    joined: dict[str, Any] = {}
    for piece in filter(None, pieces):
        joined = {name: joined.get(name, []) + part for name, part in piece.items()}
    return {"logprobs": joined}


def written(tokenizer: Any, ids: Sequence[int], top: Sequence[tuple[int, float]] = ()) -> list[Token]:
    stream = TextStream(tokenizer)
    tokens = [Token(id, stream.push(id)[0], -0.5, tuple(top)) for id in ids]
    return [*tokens, Token(tokenizer.eos_token_id, stream.end(), -0.1, (), "stop", counted=False)]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_an_answers_tokens_put_together_are_its_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    choice = answer(tokenizer, written(tokenizer, ids), chat=True)
    likely = choice["logprobs"]["content"]
    assert bytes(byte for one in likely for byte in one["bytes"]).decode() == choice["message"]["content"]
    assert len(likely) == len(ids) and all(token["token"].isprintable() or "\n" in text for token in likely)
    assert answer(tokenizer, written(tokenizer, ids), chat=True, stream=True)["logprobs"]["content"] == likely


def test_every_token_stands_for_bytes_of_its_own(tokenizer: Any) -> None:
    ids = [id for id in range(min(len(tokenizer), 3000)) if id not in tokenizer.all_special_ids]
    bytes_of = token_bytes(tokenizer)
    letter = tokenizer.convert_tokens_to_ids("x")
    for id in ids:
        after = tokenizer.decode([letter, id], clean_up_tokenization_spaces=False)[1:]
        data = bytes_of(id, False)
        assert after == data.decode(errors="replace") or (after.startswith("\ufffd") and data[0] >= 0x80), id
    # a byte token and the letter that it is are the only ones alike
    assert len({bytes_of(id, False) for id in ids}) >= len(ids) - 256


def test_a_part_of_a_character_is_spelled_and_a_blank_before_a_word_is_kept(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_byte_fallback_tokenizer(tmp_path))
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁a", "▁b", "<0xE4>", "<0xBD>")]
    likely = answer(tokenizer, written(tokenizer, ids), chat=True)["logprobs"]["content"]
    assert [one["token"] for one in likely] == ["a", " b", "\\xe4", "\\xbd"]  # an answer does not begin with the blank
    assert [one["bytes"] for one in likely] == [[97], [32, 98], [0xE4], [0xBD]]
    found = answer(tokenizer, written(tokenizer, ids), chat=False)["logprobs"]
    assert found["tokens"] == ["a", " b", "bytes:\\xe4", "bytes:\\xbd"]


@pytest.mark.parametrize("stream", [False, True])
def test_as_many_alternatives_as_asked_for_each_with_its_own_value(tmp_path: Path, stream: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_byte_fallback_tokenizer(tmp_path))
    number = tokenizer.convert_tokens_to_ids
    # three parts of characters, a letter and the byte that it is, and two rows of the model beyond the tokenizer's
    ids = [number("<0xE4>"), number("<0xBD>"), number("<0xA0>"), number("a"), number("<0x61>"), 10**6, 10**6 + 1]
    top = [(id, -float(rank)) for rank, id in enumerate(ids)]
    found = answer(tokenizer, written(tokenizer, ids, top), chat=False, stream=stream)["logprobs"]
    for id, name, likely in zip(ids, found["tokens"], found["top_logprobs"], strict=True):
        assert list(likely.values()) == [value for _, value in top]
        assert likely[name] == dict(top)[id], "the chosen token is found under its text"
    assert list(found["top_logprobs"][0])[:4] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "a"]
    assert found["tokens"][4] == "a" and f"token_id:{ids[3]}" in found["top_logprobs"][4]
