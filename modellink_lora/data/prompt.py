"""From a conversation and a template to token ids: a pair (what the model is shown, what it has to answer) per turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from modellink_lora.data.templates import NamedToken, Slot, Slots, Special, Template

ASKING = ("user", "observation")
ANSWERING = ("assistant", "function")

Ids = list[int]


class Tokenizer(Protocol):
    """What this file needs of a tokenizer; those of transformers have it."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> Ids: ...
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...


@dataclass(frozen=True)
class Message:
    """One utterance. Roles `user` and `observation` ask, `assistant` and `function` answer."""

    role: str
    content: str
    trained: bool = True  # of an answer: False makes it part of what the model is shown


@dataclass(frozen=True)
class Conversation:
    """Messages that ask and answer in turn, beginning with a question, and the text that stands before them."""

    messages: tuple[Message, ...]
    system: str = ""
    tools: str = ""  # description of the tools, follows the system text


def turns(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> list[tuple[Ids, Ids]]:
    """(source ids, target ids) of each turn. Every text slot is tokenised on its own."""
    messages = conversation.messages
    assert len(messages) % 2 == 0, "a conversation ends with an answer"
    pairs = []
    for i in range(0, len(messages), 2):
        asked, answered = messages[i], messages[i + 1]
        assert asked.role in ASKING and answered.role in ANSWERING
        source = _source(asked, conversation, template, first=i == 0)
        target = _fill(template.function if answered.role == "function" else template.assistant, answered.content)
        pairs.append((_ids(source, tokenizer), _ids(target, tokenizer)))
        if not answered.trained:
            pairs[-1] = (pairs[-1][0] + pairs[-1][1], [])
    return pairs


def encode_prompt(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> Ids:
    """Ids to generate from: `conversation` ends with a question, the model is to write the answer."""
    *before, last = turns(
        Conversation((*conversation.messages, Message("assistant", "")), conversation.system, conversation.tools),
        template,
        tokenizer,
    )
    return [token for source, target in before for token in source + target] + last[0]


def _source(message: Message, conversation: Conversation, template: Template, *, first: bool) -> Slots:
    """What stands in front of an answer: opening or separator, the system text once, and the question."""
    question = template.observation if message.role == "observation" and template.observation else template.user
    if not first:
        return template.separator + _fill(question, message.content)
    system = conversation.system or template.default_system
    if conversation.tools:
        system += ("\n" if system and not system.endswith("\n") else "") + conversation.tools
    around = _fill(template.system, system) if system else ()
    if template.system_inside_user:
        inside = "".join(slot for slot in around if isinstance(slot, str))
        return template.prefix + _fill(question, inside + message.content)
    return template.prefix + around + _fill(question, message.content)


def _fill(slots: Slots, content: str) -> Slots:
    return tuple(slot.replace("{content}", content) if isinstance(slot, str) else slot for slot in slots)


def _ids(slots: Sequence[Slot], tokenizer: Tokenizer) -> Ids:
    ids: Ids = []
    for slot in slots:
        if isinstance(slot, str):
            if slot:
                ids += tokenizer.encode(slot, add_special_tokens=False)
            continue
        if isinstance(slot, NamedToken):
            token = tokenizer.convert_tokens_to_ids(slot.text)
        else:
            token = tokenizer.bos_token_id if slot is Special.BOS else tokenizer.eos_token_id
        if token is not None:
            ids.append(token)
    return ids
