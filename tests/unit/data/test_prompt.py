"""Slots of every template, as published: `|` separates slots tokenised on their own, `->` asks for the answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.prompt import Conversation, Message, encode_prompt, turns
from modellink_lora.data.templates import BOS, EOS, TEMPLATES, NamedToken, Template, get_template
from modellink_lora.data.text_encoder import Piece


class SlotTokenizer:
    """Gives every distinct text one id, so that ids show how a prompt was cut."""

    def __init__(self, bos: bool = True) -> None:
        self._texts: list[str] = ["BOS", "EOS"]
        self.bos_token_id = 0 if bos else None
        self.eos_token_id = 1
        self.eos_token = "</s>"

    def slot(self, pieces: Sequence[Piece]) -> list[int]:
        self._texts.append("".join(piece.text for piece in pieces))
        return [len(self._texts) - 1] if self._texts[-1] else []

    def token_id(self, text: str) -> int:
        self._texts.append(f"<<{text}>>")
        return len(self._texts) - 1

    def show(self, ids: list[int]) -> str:
        return "|".join(self._texts[i] for i in ids)


def conversation(system: str = "", tools: str = "") -> Conversation:
    roles = ("user", "assistant", "user", "assistant")
    messages = tuple(Message(role, text) for role, text in zip(roles, ("U1", "A1", "U2", "A2")))
    return Conversation(messages, system=system, tools=tools)


def rendered(template: Template, talk: Conversation, tokenizer: SlotTokenizer | None = None) -> list[str]:
    tokenizer = tokenizer or SlotTokenizer()
    return [
        f"{tokenizer.show(source)} -> {tokenizer.show(target)}" for source, target in turns(talk, template, tokenizer)
    ]


_IM_U1 = "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n -> A1|EOS"
_IM_U2 = "\n|<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n -> A2|EOS"
_IM_SYSTEM = "<|im_start|>system\nSYS<|im_end|>\n|"
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_L3_U = _HEADER.format("user") + "{}<|eot_id|>" + _HEADER.format("assistant")
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)

GOLDEN = [
    ("default", "", ["Human: U1\nAssistant: -> A1|EOS", "\n|Human: U2\nAssistant: -> A2|EOS"]),
    ("default", "SYS", ["SYS\n|Human: U1\nAssistant: -> A1|EOS", "\n|Human: U2\nAssistant: -> A2|EOS"]),
    ("empty", "", ["U1 -> A1", "U2 -> A2"]),
    ("empty", "SYS", ["SYS|U1 -> A1", "U2 -> A2"]),
    (
        "alpaca",
        "",
        [
            f"{_ALPACA}|### Instruction:\nU1\n\n### Response:\n -> A1|EOS",
            "\n\n|### Instruction:\nU2\n\n### Response:\n -> A2|EOS",
        ],
    ),
    (
        "alpaca",
        "SYS",
        [
            "SYS|### Instruction:\nU1\n\n### Response:\n -> A1|EOS",
            "\n\n|### Instruction:\nU2\n\n### Response:\n -> A2|EOS",
        ],
    ),
    ("llama2", "", ["BOS|[INST] U1 [/INST] -> A1|EOS", "BOS|[INST] U2 [/INST] -> A2|EOS"]),
    (
        "llama2",
        "SYS",
        ["BOS|[INST] <<SYS>>\nSYS\n<</SYS>>\n\nU1 [/INST] -> A1|EOS", "BOS|[INST] U2 [/INST] -> A2|EOS"],
    ),
    ("llama3", "", [f"BOS|{_L3_U.format('U1')} -> A1|EOS", f"{_L3_U.format('U2')} -> A2|EOS"]),
    (
        "llama3",
        "SYS",
        [
            f"BOS|{_HEADER.format('system')}SYS<|eot_id|>|{_L3_U.format('U1')} -> A1|EOS",
            f"{_L3_U.format('U2')} -> A2|EOS",
        ],
    ),
    ("qwen", "", [_IM_SYSTEM.replace("SYS", "You are a helpful assistant.") + _IM_U1, _IM_U2]),
    ("qwen", "SYS", [_IM_SYSTEM + _IM_U1, _IM_U2]),
    ("chatml", "", [_IM_U1, _IM_U2]),
    ("chatml", "SYS", [_IM_SYSTEM + _IM_U1, _IM_U2]),
    ("mistral", "", ["BOS|[INST] U1 [/INST] -> A1|EOS", "[INST] U2 [/INST] -> A2|EOS"]),
    ("mistral", "SYS", ["BOS|SYS|[INST] U1 [/INST] -> A1|EOS", "[INST] U2 [/INST] -> A2|EOS"]),
]


@pytest.mark.parametrize(("name", "system", "expected"), GOLDEN)
def test_a_template_gives_its_published_slots(name: str, system: str, expected: list[str]) -> None:
    assert rendered(TEMPLATES[name], conversation(system)) == expected


def test_every_template_has_golden_slots() -> None:
    assert {name for name, _, _ in GOLDEN} == set(TEMPLATES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", _L3_U.replace("user", "tool").format("R")),
        ("qwen", "\n|<|im_start|>tool\nR<|im_end|>\n<|im_start|>assistant\n"),
        ("chatml", "\n|<|im_start|>tool\nR<|im_end|>\n<|im_start|>assistant\n"),
        ("mistral", "[INST] R [/INST]"),
    ],
)
def test_a_tools_result_stands_in_the_templates_own_slot_or_the_users(name: str, expected: str) -> None:
    roles = ("user", "function", "observation", "assistant")
    talk = Conversation(tuple(Message(role, text) for role, text in zip(roles, "UCRA")))
    call, result = rendered(TEMPLATES[name], talk)
    assert call.endswith(" -> C|EOS")
    assert result == f"{expected} -> A|EOS"


def test_tools_follow_the_system_text_on_a_line_of_their_own() -> None:
    assert rendered(TEMPLATES["empty"], conversation("SYS", "TOOLS"))[0] == "SYS\nTOOLS|U1 -> A1"
    assert rendered(TEMPLATES["empty"], conversation("", "TOOLS"))[0] == "TOOLS|U1 -> A1"
    inside = rendered(TEMPLATES["llama2"], conversation("", "TOOLS"))[0]
    assert inside == "BOS|[INST] <<SYS>>\nTOOLS\n<</SYS>>\n\nU1 [/INST] -> A1|EOS"


def test_a_message_that_looks_like_a_slot_is_left_as_it_is() -> None:
    talk = Conversation((Message("user", "a {content} b"), Message("assistant", "{content}")), system="{content}")
    assert rendered(TEMPLATES["llama2"], talk) == [
        "BOS|[INST] <<SYS>>\n{content}\n<</SYS>>\n\na {content} b [/INST] -> {content}|EOS"
    ]


def test_a_tokenizer_without_bos_leaves_that_slot_out() -> None:
    assert rendered(TEMPLATES["llama2"], conversation(), SlotTokenizer(bos=False))[1] == "[INST] U2 [/INST] -> A2|EOS"


def test_a_named_token_is_looked_up_and_not_tokenised() -> None:
    template = Template(
        name="x", prefix=(NamedToken("[gMASK]"), BOS), user=("{content}",), assistant=("{content}", EOS)
    )
    assert rendered(template, conversation())[0] == "<<[gMASK]>>|BOS|U1 -> A1|EOS"


def test_a_prompt_to_generate_from_is_the_sample_without_its_last_answer() -> None:
    tokenizer = SlotTokenizer()
    asked = Conversation(conversation().messages[:3], system="SYS")
    shown = tokenizer.show(encode_prompt(asked, TEMPLATES["llama2"], tokenizer))
    assert shown == "BOS|[INST] <<SYS>>\nSYS\n<</SYS>>\n\nU1 [/INST]|A1|EOS|BOS|[INST] U2 [/INST]"


@pytest.mark.parametrize("name", ["bloom", None])
def test_an_unknown_or_missing_template_lists_those_there_are(name: str | None) -> None:
    with pytest.raises(UserError, match=r"llama2.*chatml"):
        get_template(name)
