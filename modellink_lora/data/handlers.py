"""The record formats of `--handler-name`: each turns one row of a data set into a Conversation, or says why it cannot.

A handler is a row of HANDLERS: the columns it reads, by the keys of `--map-keys`, and a function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from modellink_lora.config.document import is_unicode
from modellink_lora.config.errors import UserError
from modellink_lora.data import tools
from modellink_lora.data.prompt import ANSWERING, Conversation, Message

Record = Mapping[str, Any]
Names = Mapping[str, str | None]

EMPTY_ANSWER = "empty answer"  # why a record is dropped


@dataclass(frozen=True)
class Layout:
    """Where a record holds what: map key -> column, tag -> its spelling; None where there is none."""

    columns: Names
    tags: Names = field(default_factory=dict)

    def value(self, record: Record, key: str) -> Any:
        column = self.columns.get(key)
        return None if column is None else record.get(column)

    def text(self, record: Record, key: str) -> str:
        """Text of a column, "" where it is empty. Raises _Unusable for anything but text."""
        value = self.value(record, key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise _Unusable(f"{self.columns[key]} is not text")
        return value


@dataclass(frozen=True)
class Handler:
    """One record format. `columns` and `tags` are the names that hold unless `--map-keys` says otherwise."""

    read: Callable[[Record, Layout], Conversation]
    columns: Names
    tags: Names = field(default_factory=dict)


@dataclass(frozen=True)
class RecordReader:
    """A handler together with the columns of one data set; made by `reader_for`."""

    handler_name: str
    layout: Layout

    def read(self, record: Record) -> Conversation | str:
        """The conversation in `record`, or the reason why it is dropped."""
        try:
            conversation = HANDLERS[self.handler_name].read(record, self.layout)
        except _Unusable as reason:
            return str(reason)
        if not all(
            map(is_unicode, (*(m.content for m in conversation.messages), conversation.system, conversation.tools))
        ):
            return "text is not valid Unicode"
        # one rule for every turn: an empty answer would train the model to say nothing
        for message in conversation.messages:
            if not message.content.strip():
                return EMPTY_ANSWER if message.role in ANSWERING else "empty question"
        return conversation

    @property
    def columns(self) -> list[str]:
        """Columns that are read."""
        return [column for column in self.layout.columns.values() if column is not None]

    def unused_keys(self, record: Record) -> set[str]:
        """Keys of the messages in `record` that hold something and are not read."""
        messages = self.layout.value(record, "messages")
        if not isinstance(messages, list):
            return set()
        known = {self.layout.tags["role_tag"], self.layout.tags["content_tag"], *_SWITCHES, *_CALLS}
        return {
            key
            for message in messages
            if isinstance(message, Mapping)
            for key, value in message.items()
            if key not in known and not _is_empty(value)
        }

    def unused(self, columns: Collection[str]) -> list[str]:
        """Columns of the data set that are not read."""
        return [column for column in columns if column not in self.layout.columns.values()]


class _Unusable(Exception):
    """Why a record is dropped: the same words for the same fault, they are counted."""


def reader_for(handler_name: str, map_keys: Mapping[str, Any] | None, columns: Collection[str]) -> RecordReader:
    """The reader of a data set with these `columns`. Raises UserError for a handler, key or column there is not."""
    names = ", ".join(HANDLERS)
    if not handler_name:
        raise UserError(f"--handler-name is missing: say how a record is read: {names}")
    if handler_name not in HANDLERS:
        raise UserError(f"--handler-name {handler_name} is not offered in this version; choose {names}")
    handler = HANDLERS[handler_name]
    layout = _layout(handler, dict(map_keys or {}))
    for key, column in layout.columns.items():
        if column is not None and column not in columns:
            raise UserError(
                f"the data have no column {column!r}, which {handler_name} reads as {key!r}; columns found: "
                f"{', '.join(sorted(columns)) or 'none'}. Name the right one with --map-keys "
                f'\'{{"{key}": "COLUMN"}}\'' + (', or "" for none' if key not in _NEEDED else "")
            )
    return RecordReader(handler_name, layout)


def _layout(handler: Handler, map_keys: dict[str, Any]) -> Layout:
    tags = map_keys.pop("tags", None) if handler.tags else None
    columns = dict(handler.columns)
    _apply(columns, map_keys, "--map-keys", extra=("tags",) if handler.tags else ())
    if not isinstance(tags, Mapping | None):
        raise UserError('--map-keys: tags must be an object such as {"role_tag": "role", "content_tag": "content"}')
    if not tags:
        return Layout(columns, handler.tags)
    # tags are given together: one that is left out does not occur in the data
    spelled: dict[str, str | None] = dict.fromkeys(handler.tags)
    _apply(spelled, tags, "--map-keys tags")
    for needed in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
        if spelled[needed] is None:
            raise UserError(f"--map-keys: tags lack {needed!r}; when tags are given, all that occur must be")
    return Layout(columns, spelled)


def _apply(names: dict[str, str | None], given: Mapping[str, Any], what: str, *, extra: tuple[str, ...] = ()) -> None:
    for key, name in given.items():
        if key not in names:
            raise UserError(f"{what}: no key {key!r} for this handler; it knows {', '.join((*names, *extra))}")
        if not isinstance(name, str | None):
            raise UserError(f"{what}: {key!r} must be a name in quotes, got {name!r}")
        if not name and key in _NEEDED:
            raise UserError(f"{what}: {key!r} cannot be left empty, every record needs it")
        names[key] = name or None


def _alpaca(record: Record, layout: Layout) -> Conversation:
    """An instruction with an optional input, and its answer; earlier pairs of both in `history`."""
    answer = layout.value(record, "response")
    if isinstance(answer, list):
        raise _Unusable("several answers in one record")
    question = "\n".join(text for text in (layout.text(record, "prompt"), layout.text(record, "query")) if text)
    messages = []
    for pair in _history(layout.value(record, "history")):
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages += [Message("user", question), Message("assistant", layout.text(record, "response"))]
    return Conversation(tuple(messages), system=layout.text(record, "system"))


def _history(value: Any) -> list[list[str]]:
    pairs = [] if value is None or value == "" else value
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise _Unusable("history is not a list of [question, answer] pairs")
    return pairs


def _sharegpt(record: Record, layout: Layout) -> Conversation:
    """A list of messages that carry a role each; a system message may come first."""
    messages = layout.value(record, "messages")
    if messages is None:
        raise _Unusable(f"no {layout.columns['messages']}")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise _Unusable("messages are not a list of objects")
    system = layout.text(record, "system")
    roles = {layout.tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "function")}
    opening = {**roles, layout.tags["system_tag"]: "system"}
    said = [_message(message, layout, roles if i else opening) for i, message in enumerate(messages)]
    if said and said[0].role == "system":
        system = said.pop(0).content
    turns = _results_joined(said)
    for i, message in enumerate(turns):
        if message.role not in (("user", "observation"), ("assistant", "function"))[i % 2]:
            raise _Unusable("questions and answers do not take turns")
    if not turns or len(turns) % 2:
        raise _Unusable("the conversation does not end with an answer")
    try:
        described = tools.describe_tools(layout.value(record, "tools") or [])
    except ValueError as error:
        raise _Unusable(str(error)) from None
    return Conversation(turns, system=system, tools=described)


# what a message says about the loss of its tokens: OpenAI and Mistral, ms-swift, axolotl
_SWITCHES = ("weight", "loss", "train", "train_turn", "train_detail")
# calls of tools beside the text of a message: OpenAI, and OpenAI before it took several calls at once
_CALLS = ("tool_calls", "function_call")


def _message(message: Mapping[str, Any], layout: Layout, roles: Mapping[str | None, str]) -> Message:
    """The message with its calls behind its text; `roles` are the spellings that can stand at its place."""
    role_tag, content_tag = str(layout.tags["role_tag"]), str(layout.tags["content_tag"])
    role, content = message.get(role_tag), message.get(content_tag)
    known = roles.get(role) if isinstance(role, str) else None
    if known is None:
        raise _Unusable(f"unknown role {str(role)[:40]!r}")
    answers = known in ("assistant", "function")
    more = {key: value for key, value in message.items() if key not in (role_tag, content_tag) and not _is_empty(value)}
    trained = _trained({key: more[key] for key in _SWITCHES if key in more}, f"a message of {role!r}", answers=answers)
    calls = [more[key] for key in _CALLS if key in more and more[key] not in ("[]", "{}", "null")]
    if calls and not answers:
        raise _Unusable(f"a message of {role!r} calls tools")
    if calls and _is_empty(content):
        content = ""
    elif known == "function":  # its content is a call, or a list of calls
        calls, content = [content, *calls], ""
    if not isinstance(content, str):
        raise _Unusable(f"a message of {role!r} has no text")
    if not calls:
        return Message(known, content, trained)
    try:
        lines = [tools.call_text(call) for call in calls]
    except ValueError as error:
        raise _Unusable(str(error)) from None
    return Message("function", "\n".join([content, *lines] if content.strip() else lines), trained)


def _trained(switches: Mapping[str, Any], what: str, *, answers: bool) -> bool:
    """Whether a message is trained, by what it says itself; one that says nothing is."""
    for key, value in switches.items():
        if value not in (0, 1):
            raise _Unusable(f"{key} of {what} is neither 0 nor 1: an answer is trained as a whole or not at all")
        if value and not answers:
            raise _Unusable(f"{key} of {what} asks to train it: only answers can be trained")
    if len(set(map(bool, switches.values()))) > 1:
        raise _Unusable(f"{' and '.join(switches)} of {what} contradict each other")
    return all(switches.values())


def _results_joined(said: list[Message]) -> tuple[Message, ...]:
    """The messages with results of tools that follow each other as one, like the calls that they answer."""
    joined: list[Message] = []
    for message in said:
        if message.role == "observation" and joined and joined[-1].role == "observation":
            message = Message("observation", f"{joined.pop().content}\n{message.content}")
        joined.append(message)
    return tuple(joined)


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


_NEEDED = ("prompt", "response", "messages", "role_tag", "content_tag", "user_tag", "assistant_tag")

HANDLERS: dict[str, Handler] = {
    "AlpacaStyleInstructionHandler": Handler(
        read=_alpaca,
        columns={"prompt": "instruction", "query": "input", "response": "output", "system": None, "history": None},
    ),
    "SharegptStyleInstructionHandler": Handler(
        read=_sharegpt,
        columns={"messages": "conversations", "system": None, "tools": None},
        tags={
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    ),
}
