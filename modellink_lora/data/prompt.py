"""From a conversation and a template to token ids: a pair (what the model is shown, what it has to answer) per turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from modellink_lora.data.templates import EOS, NamedToken, Slots, Special, Template
from modellink_lora.data.text_encoder import Ids, Piece

ASKING = ("user", "observation")
ANSWERING = ("assistant", "function")

FilledSlot = Sequence[Piece] | Special | NamedToken


class Encoder(Protocol):
    """What this file needs to make ids; a TextEncoder has it."""

    bos_token_id: int | None
    eos_token_id: int | None
    eos_token: str | None

    def slot(self, pieces: Sequence[Piece]) -> Ids: ...
    def token_id(self, text: str) -> int | None: ...


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


def turns(conversation: Conversation, template: Template, encoder: Encoder) -> list[tuple[Ids, Ids]]:
    """(source ids, target ids) of each turn. Every text slot is tokenised on its own.

    Raises NotText for a text that spells a special token where the tokenizer cannot write that as text.
    """
    messages = conversation.messages
    assert len(messages) % 2 == 0, "a conversation ends with an answer"
    pairs = []
    for i in range(0, len(messages), 2):
        asked, answered = messages[i], messages[i + 1]
        assert asked.role in ASKING and answered.role in ANSWERING
        source = _source(asked, conversation, template, first=i == 0)
        slots = template.function if answered.role == "function" else template.assistant
        answer = without_end(answered.content, encoder.eos_token)
        if answer != answered.content and EOS not in slots:
            slots = (*slots, EOS)
        pairs.append((_ids(source, encoder), _ids(_fill(slots, _by_user(answer)), encoder)))
        if not answered.trained:
            pairs[-1] = (pairs[-1][0] + pairs[-1][1], [])
    return pairs


def encode_prompt(conversation: Conversation, template: Template, encoder: Encoder) -> Ids:
    """Ids to generate from: `conversation` ends with a question, the model is to write the answer."""
    *before, last = turns(
        Conversation((*conversation.messages, Message("assistant", "")), conversation.system, conversation.tools),
        template,
        encoder,
    )
    return [token for source, target in before for token in source + target] + last[0]


def without_end(answer: str, end: str | None) -> str:
    """`answer` without the text of the end token at its end, where it is that token: a template writes one itself."""
    while end and answer.rstrip().endswith(end):
        answer = answer.rstrip().removesuffix(end)
    return answer


def _source(message: Message, conversation: Conversation, template: Template, *, first: bool) -> list[FilledSlot]:
    """What stands in front of an answer: opening or separator, the system text once, and the question."""
    question = template.observation if message.role == "observation" and template.observation else template.user
    asked = _by_user(message.content)
    if not first:
        return [*_fill(template.separator), *_fill(question, asked)]
    system = conversation.system or template.default_system
    if conversation.tools:
        system += ("\n" if system and not system.endswith("\n") else "") + conversation.tools
    around = _fill(template.system, _by_user(system)) if system else []
    if template.system_inside_user:
        inside = [piece for slot in around if not isinstance(slot, Special | NamedToken) for piece in slot]
        return [*_fill(template.prefix), *_fill(question, [*inside, *asked])]
    return [*_fill(template.prefix), *around, *_fill(question, asked)]


def _by_user(text: str) -> list[Piece]:
    return [Piece(text, by_user=True)]


def _fill(slots: Slots, content: Sequence[Piece] = ()) -> list[FilledSlot]:
    filled: list[FilledSlot] = []
    for slot in slots:
        if isinstance(slot, str):
            before, place, after = slot.partition("{content}")
            filled.append([Piece(before), *(content if place else ()), Piece(after)])
        else:
            filled.append(slot)
    return filled


def _ids(slots: Sequence[FilledSlot], encoder: Encoder) -> Ids:
    ids: Ids = []
    for slot in slots:
        if not isinstance(slot, Special | NamedToken):
            ids += encoder.slot(slot)
            continue
        if isinstance(slot, NamedToken):
            token = encoder.token_id(slot.text)
        else:
            token = encoder.bos_token_id if slot is Special.BOS else encoder.eos_token_id
        if token is not None:
            ids.append(token)
    return ids
