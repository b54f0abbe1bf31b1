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
    role_tag, content_tag = str(layout.tags["role_tag"]), str(layout.tags["content_tag"])
    spoken = [(message.get(role_tag), message.get(content_tag)) for message in messages]
    system = layout.text(record, "system")
    if spoken and spoken[0][0] is not None and spoken[0][0] == layout.tags["system_tag"]:
        system = _content(*spoken.pop(0))
    roles: dict[str | None, str | None] = {
        layout.tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "function")
    }
    roles.pop(None, None)
    turns = tuple(_message(roles, role, content) for role, content in spoken)
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


def _message(roles: Mapping[str | None, str | None], role: Any, content: Any) -> Message:
    known = roles.get(role) if isinstance(role, str) else None
    if known is None:
        raise _Unusable(f"unknown role {str(role)[:40]!r}")
    if known != "function":
        return Message(known, _content(role, content))
    try:
        return Message(known, tools.call_text(content))
    except ValueError as error:
        raise _Unusable(str(error)) from None


def _content(role: Any, content: Any) -> str:
    if not isinstance(content, str):
        raise _Unusable(f"a message of {role!r} has no text")
    return content


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
