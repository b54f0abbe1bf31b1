"""The chat template written for other programs gives the ids that training gives, and the token that ends an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.data.chat_template import Ending, best_chat_template, differences, ending_of
from modellink_lora.data.handlers import reader_for
from modellink_lora.data.prompt import Conversation, Message, encode_prompt, turns
from modellink_lora.data.templates import EOS, TEMPLATES, NamedToken, Template, get_template
from modellink_lora.data.text_encoder import TextEncoder
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.data.tools import call_text, describe_tools
from tests.helpers.shared import is_there, shared
from tests.helpers.tiny_tokenizer import LLAMA3, make_spaced_tokenizer, make_tokenizer

TALK = [
    ("What is 2 + 2?", "It is 4."),
    ("(a) or (b)?", "Paris, of course."),
    ("巴黎\n- one\n- two", "Yes.\n\nTwo lines"),
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": {
        "type": "object", "required": ["city"],
        "properties": {"city": {"type": "string", "description": "where"}, "days": {"type": "integer"},
                       "units": {"type": "array", "items": {"type": "string"}, "enum": ["°C", "K"]}}}}},
    {"name": "now"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": make_tokenizer(root / "bytes", LLAMA3),
        "spaces": make_spaced_tokenizer(root / "spaces", everywhere=True),
        "first space": make_spaced_tokenizer(root / "first", everywhere=False),
    }


def messages(system: str, length: int) -> list[dict[str, str]]:
    found = [{"role": "system", "content": system}] if system else []
    for question, answer in TALK[:length]:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


def record(system: str, length: int) -> dict[str, Any]:
    (question, answer), past = TALK[length - 1], TALK[: length - 1]
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "system": system,
        "history": [list(p) for p in past],
    }


def pairs(template: Template, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(ids of the chat template, ids of preprocessing) of whole samples and of prompts."""
    text = best_chat_template(template, tokenizer).text
    reader = reader_for(
        "AlpacaStyleInstructionHandler", {"system": "system", "history": "history"}, list(record("", 1))
    )

    def ids(asked: list[dict[str, str]], opens: bool) -> list[int]:
        return list(
            tokenizer.apply_chat_template(asked, chat_template=text, add_generation_prompt=opens, return_dict=False)
        )

    found = []
    for system in ("", "Answer in a word."):
        for length in (1, 2, 3):
            conversation = reader.read(record(system, length))
            assert isinstance(conversation, Conversation)
            made = turns(conversation, template, encoder(template, tokenizer))
            whole = [x for source, target in made for x in (*source, *target)]
            found += [
                (ids(messages(system, length), False), whole),
                (ids(messages(system, length)[:-1], True), whole[: len(whole) - len(made[-1][1])]),
            ]
    return found


def encoder(template: Template, tokenizer: Any) -> TextEncoder:
    return TextEncoder(tokenizer, split_special_tokens=True, template_text=template.text)


def fitted(folder: Path, name: str) -> tuple[Template, Any]:
    return get_template(name), load_tokenizer(folder, prompt_type=name)


# llama3's tokens are in no tokenizer that begins texts with spaces
KINDS = [("bytes", "llama3"), *((k, n) for k in ("bytes", "spaces", "first space") for n in TEMPLATES if n != "llama3")]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_the_chat_template_gives_the_ids_of_preprocessing(folders: Mapping[str, Path], kind: str, name: str) -> None:
    template, tokenizer = fitted(folders[kind], name)
    assert best_chat_template(template, tokenizer).differing == 0
    for found, expected in pairs(template, tokenizer):
        assert found == expected


@pytest.mark.parametrize("model, name", [
    ("smollm2-bpe-49k", "qwen"), *(("mistral-v1-32k", name) for name in ("alpaca", "llama2", "mistral")),
])  # fmt: skip
def test_so_it_does_for_published_tokenizers(model: str, name: str) -> None:
    template, tokenizer = fitted(shared(f"models/tokenizers/{model}"), name)
    for found, expected in pairs(template, tokenizer):
        assert found == expected


def test_what_a_tokenizer_joins_in_one_text_is_counted() -> None:
    """Blank lines before a hash sign are one token alone and two in front of it."""
    if not is_there("models/tokenizers/smollm2-bpe-49k"):
        pytest.skip("needs a tokenizer that joins")
    template, tokenizer = fitted(shared("models/tokenizers/smollm2-bpe-49k"), "alpaca")
    best = best_chat_template(template, tokenizer)
    assert 0 < best.differing <= best.tried and best.differing == differences(template, tokenizer, best.text)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_and_their_calls_and_results_are_written_as_training_writes_them(
    folders: Mapping[str, Path], name: str
) -> None:
    template, tokenizer = fitted(folders["bytes"], name)
    calls = [{"name": "weather", "arguments": {"city": "Zürich"}}, {"name": "now", "arguments": "{}"}]
    asked = [
        {"role": "user", "content": "Hot?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]},
        {"role": "tool", "content": "31"},
    ]
    conversation = Conversation(
        (Message("user", "Hot?"), Message("function", call_text(calls)), Message("observation", "31")),
        system="Be brief.", tools=describe_tools(TOOLS),
    )  # fmt: skip
    found = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *asked], tools=TOOLS, add_generation_prompt=True,
        return_dict=False, chat_template=best_chat_template(template, tokenizer).text,
    )  # fmt: skip
    assert found == encode_prompt(conversation, template, encoder(template, tokenizer))


def test_a_question_without_generation_prompt_does_not_open_the_answer(folders: Mapping[str, Path]) -> None:
    template, tokenizer = fitted(folders["bytes"], "chatml")
    asked = [{"role": "user", "content": "Hello"}]
    text = best_chat_template(template, tokenizer).text
    closed, opened = (
        tokenizer.apply_chat_template(asked, chat_template=text, tokenize=False, add_generation_prompt=opens)
        for opens in (False, True)
    )
    assert closed == "<|im_start|>user\nHello<|im_end|>\n" and opened == closed + "<|im_start|>assistant\n"


@pytest.mark.parametrize("asked, reason", [
    (["user", "system"], "begins with it"), (["user", "user"], "in turn"), (["assistant"], "in turn"),
    (["critic"], "no role"),
])  # fmt: skip
def test_messages_that_training_has_no_form_for_are_refused(
    folders: Mapping[str, Path], asked: list[str], reason: str
) -> None:
    template, tokenizer = fitted(folders["bytes"], "chatml")
    with pytest.raises(Exception, match=reason):
        tokenizer.apply_chat_template(
            [{"role": role, "content": "x"} for role in asked],
            chat_template=best_chat_template(template, tokenizer).text,
        )


@pytest.mark.parametrize("assistant, expected", [
    (("{content}", EOS), ("</s>", "</s>")), (("{content}", "<|im_end|>\n"), ("<|im_end|>", "<|im_end|>\n")),
    (("{content}<|eot_id|>",), ("<|eot_id|>", "<|eot_id|>")),
    (("{content}", NamedToken("<|im_end|>")), ("<|im_end|>", "<|im_end|>")),
    (("{content}",), (None, "")), (("{content}", "\n### End"), (None, "\n### End")),
])  # fmt: skip
def test_the_ending_is_the_token_or_the_text_behind_an_answer(
    folders: Mapping[str, Path], assistant: tuple[Any, ...], expected: tuple[str | None, str]
) -> None:
    tokenizer = load_tokenizer(folders["bytes"])
    token, text = expected
    number = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert ending_of(Template("own", user=("{content}",), assistant=assistant), tokenizer) == Ending(
        token, number, text
    )


def test_a_message_in_parts_is_refused_rather_than_written_as_a_list(folders: Mapping[str, Path]) -> None:
    template, tokenizer = fitted(folders["bytes"], "chatml")
    with pytest.raises(Exception, match="text and nothing else"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}],
            chat_template=best_chat_template(template, tokenizer).text,
        )


def test_quotes_braces_and_backslashes_of_a_template_are_kept(folders: Mapping[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["bytes"])
    odd = 'He said: "{{ x }}" {% if %} \\n \t' + json.dumps({"a": [1]}) + " {# é #}\n"
    template = Template("odd", user=(odd + "{content}",), separator=("\n",))
    assert best_chat_template(template, tokenizer).differing == 0
