"""Prompts get the asked template around them, and what ends an answer is collected from everywhere it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.inference.prompting import Prompter
from tests.helpers.tiny_tokenizer import make_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}assistant:"
USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}


def prompter(folder: Path, *, chat_template: str | None = None, **settings: Any) -> Prompter:
    make_tokenizer(folder)
    prompt_type = settings.pop("prompt_type", None)
    tokenizer = load_tokenizer(folder, prompt_type=prompt_type)
    tokenizer.chat_template = chat_template
    settings = {"hf_chat_template": False, **settings}
    return Prompter(tokenizer, prompt_type=prompt_type, folder=folder, **settings)


def text(found: Prompter, ids: list[int]) -> str:
    return found.tokenizer.decode(ids)


def test_a_prompt_without_template_is_the_tokenizers_own_encoding(tmp_path: Path) -> None:
    found = prompter(tmp_path)
    assert found.text("Hi") == found.tokenizer.encode("Hi")
    with pytest.raises(UserError, match="messages need a template: give --prompt-type or --hf-chat-template"):
        found.chat([USER])


def test_a_template_wraps_prompts_and_conversations(tmp_path: Path) -> None:
    found = prompter(tmp_path, prompt_type="chatml")
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text(found, found.text("Hi")) == asked
    system = {"role": "system", "content": "Be kind."}
    assert text(found, found.chat([system, USER, BOT, USER])) == (
        f"<|im_start|>system\nBe kind.<|im_end|>\n{asked}Yes.<|im_end|>\n{asked}"
    )


def test_the_tokenizers_own_template_takes_texts_and_conversations(tmp_path: Path) -> None:
    found = prompter(tmp_path, chat_template=TEMPLATE, hf_chat_template=True)
    assert text(found, found.text("Hi")) == "<|im_start|>user: Hi<|im_end|>assistant:"
    assert text(found, found.chat([USER, BOT, USER])).count("user: Hi") == 2
    with pytest.raises(UserError, match="has none; give a --prompt-type instead"):
        prompter(tmp_path, hf_chat_template=True)


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([USER, USER], "ask and answer in turn and end with a question; found user, user"),
        ([USER, BOT], "end with a question"),
        ([BOT], "end with a question"),
        ([{"role": "boss", "content": ""}], "no role is called boss"),
        ([USER, BOT, {"role": "system", "content": "x"}, USER], "one system message at most, and begins with it"),
    ],
)
def test_conversations_that_do_not_fit_are_refused(messages: list[dict[str, str]], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        prompter(tmp_path, prompt_type="chatml").chat(messages)


def test_answers_end_at_eos_template_words_generation_config_and_flags(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    found = prompter(tmp_path, prompt_type="chatml", stop_words=["!", "<pad>"])
    vocab = found.tokenizer.get_vocab()
    assert found.stop_ids == {vocab["<|im_end|>"], vocab["<|im_start|>"], 2, 7, vocab["!"], vocab["<pad>"]}
    (tmp_path / "generation_config.json").unlink()
    assert 9 in prompter(tmp_path).stop_ids
    with pytest.raises(UserError, match="--add-eos-token zzqq: is 4 tokens to this tokenizer, not one"):
        prompter(tmp_path, stop_words=["zzqq"])
