"""Records to conversations: what each format keeps, and what it drops with which reason."""

from __future__ import annotations

from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.handlers import reader_for
from modellink_lora.data.prompt import Conversation
from modellink_lora.data.tools import call_text, describe_tools

ALPACA, SHAREGPT = "AlpacaStyleInstructionHandler", "SharegptStyleInstructionHandler"
ALPACA_COLUMNS = ("instruction", "input", "output", "system", "history")
OPENAI = {
    "messages": "messages",
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def alpaca(record: dict[str, Any], map_keys: dict[str, Any] | None = None) -> Conversation | str:
    return reader_for(ALPACA, map_keys, ALPACA_COLUMNS).read(record)


def sharegpt(messages: Any, *, tools: Any = None, system: str = "") -> Conversation | str:
    record = {"conversations": messages, "tools": tools, "system": system}
    map_keys = {"tools": "tools", "system": "system"}
    return reader_for(SHAREGPT, map_keys, tuple(record)).read(record)


def said(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


def shown(conversation: Conversation | str) -> list[tuple[str, str]]:
    assert isinstance(conversation, Conversation), conversation
    return [(message.role, message.content) for message in conversation.messages]


def test_alpaca_joins_instruction_and_input_with_one_newline_and_skips_an_empty_one() -> None:
    for instruction, query, expected in (("I", "Q", "I\nQ"), ("I", "", "I"), ("I", None, "I"), ("", "Q", "Q")):
        record = {"instruction": instruction, "input": query, "output": "A"}
        assert shown(alpaca(record)) == [("user", expected), ("assistant", "A")]


def test_alpaca_history_comes_before_the_question_when_it_is_mapped() -> None:
    record = {"instruction": "I", "output": "A", "history": [["U0", "A0"], ["U1", "A1"]], "system": "S"}
    talk = alpaca(record, {"history": "history", "system": "system"})
    assert shown(talk) == [
        ("user", "U0"), ("assistant", "A0"), ("user", "U1"), ("assistant", "A1"), ("user", "I"), ("assistant", "A"),
    ]  # fmt: skip
    assert isinstance(talk, Conversation) and talk.system == "S"
    unmapped = alpaca(record)
    assert shown(unmapped) == [("user", "I"), ("assistant", "A")]
    assert isinstance(unmapped, Conversation) and unmapped.system == ""


@pytest.mark.parametrize("history", ["text", [["only one"]], [["a", "b", "c"]], [["a", None]], ["ab"], {"a": "b"}])
def test_alpaca_history_of_another_shape_drops_the_record(history: Any) -> None:
    record = {"instruction": "I", "output": "A", "history": history}
    assert alpaca(record, {"history": "history"}) == "history is not a list of [question, answer] pairs"


@pytest.mark.parametrize("history", [None, "", []])
def test_alpaca_without_history_in_a_row_is_a_single_turn(history: Any) -> None:
    assert len(shown(alpaca({"instruction": "I", "output": "A", "history": history}, {"history": "history"}))) == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "I", "input": "", "output": ""}, "empty answer"),
        ({"instruction": "I", "input": "", "output": None}, "empty answer"),
        ({"instruction": "I", "input": "", "output": " \n"}, "empty answer"),
        ({"instruction": "", "input": "", "output": "A"}, "empty question"),
        ({"instruction": "I", "input": "", "output": ["A", "B"]}, "several answers in one record"),
        ({"instruction": 7, "input": "", "output": "A"}, "instruction is not text"),
    ],
)
def test_alpaca_records_that_cannot_train_are_dropped_with_a_reason(record: dict[str, Any], reason: str) -> None:
    assert alpaca(record) == reason


def test_map_keys_rename_columns_and_an_empty_name_means_none() -> None:
    reader = reader_for(ALPACA, {"prompt": "q", "query": "", "response": "a"}, ("q", "a", "id"))
    assert shown(reader.read({"q": "Q", "a": "A", "input": "x"})) == [("user", "Q"), ("assistant", "A")]
    assert reader.unused(("q", "a", "id")) == ["id"]


def test_sharegpt_reads_several_turns_with_system_calls_and_results() -> None:
    call = '{"name": "find", "arguments": {"x": 1}}'
    talk = sharegpt(
        said(("system", "S"), ("human", "U"), ("function_call", call), ("observation", "R"), ("gpt", "A")),
        system="column",
    )
    assert shown(talk) == [
        ("user", "U"),
        ("function", 'Action: find\nAction Input: {"x": 1}'),
        ("observation", "R"),
        ("assistant", "A"),
    ]
    assert isinstance(talk, Conversation) and talk.system == "S"
    other = sharegpt(said(("human", "U"), ("gpt", "A")), system="column")
    assert isinstance(other, Conversation) and other.system == "column"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (said(("gpt", "A"), ("human", "U")), "questions and answers do not take turns"),
        (said(("human", "U"), ("human", "U"), ("gpt", "A")), "questions and answers do not take turns"),
        (said(("human", "U"), ("system", "S")), "unknown role 'system'"),
        (said(("human", "U"), ("robot", "A")), "unknown role 'robot'"),
        ([{"value": "U"}], "unknown role 'None'"),
        (said(("human", "U")), "the conversation does not end with an answer"),
        (said(("human", "U"), ("gpt", "A"), ("human", "U")), "the conversation does not end with an answer"),
        (said(("system", "S")), "the conversation does not end with an answer"),
        ([], "the conversation does not end with an answer"),
        (None, "no conversations"),
        ("text", "messages are not a list of objects"),
        (["text"], "messages are not a list of objects"),
        (said(("human", "U"), ("gpt", None)), "a message of 'gpt' has no text"),
        (said(("human", "U"), ("gpt", "")), "empty answer"),
        (said(("human", " "), ("gpt", "A")), "empty question"),
        (said(("human", "U"), ("function_call", "find it")), "the function call is not JSON"),
        (said(("human", "U"), ("function_call", '{"name": "f"}')), "the function call has no name and arguments"),
    ],
)
def test_sharegpt_records_that_cannot_train_are_dropped_with_a_reason(messages: Any, reason: str) -> None:
    assert sharegpt(messages) == reason


def test_openai_messages_are_sharegpt_with_other_tags() -> None:
    reader = reader_for(SHAREGPT, OPENAI, ("messages",))
    spoken = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"))]
    talk = reader.read({"messages": spoken})
    assert shown(talk) == [("user", "U"), ("assistant", "A")]
    assert isinstance(talk, Conversation) and talk.system == "S"
    # a tag that is not listed does not occur, its default spelling included
    spoken.insert(2, {"role": "function_call", "content": "{}"})
    assert reader.read({"messages": spoken}) == "unknown role 'function_call'"


TOOL = {
    "name": "find",
    "description": "Find it",
    "parameters": {
        "type": "object",
        "properties": {
            "x": {"type": "array", "items": {"type": "string"}, "description": "what"},
            "y": {"enum": ["a"]},
        },
        "required": ["x"],
    },
}


@pytest.mark.parametrize("wrapped", [TOOL, {"type": "function", "function": TOOL}])
def test_tools_are_listed_with_their_arguments(wrapped: dict[str, Any]) -> None:
    text = describe_tools([wrapped])
    assert (
        "> Tool Name: find\nTool Description: Find it\nTool Args:\n"
        '  - x (array of string, required): what\n  - y (any): ; one of ["a"]\n'
    ) in text
    assert "Action: the name of the tool, one of find\n" in text


def test_tools_of_a_record_reach_the_conversation_and_broken_ones_drop_it() -> None:
    messages = said(("human", "U"), ("gpt", "A"))
    talk = sharegpt(messages, tools='[{"name": "find"}]')
    assert isinstance(talk, Conversation) and "> Tool Name: find" in talk.tools
    none = sharegpt(messages, tools="[]")
    assert isinstance(none, Conversation) and none.tools == ""
    assert sharegpt(messages, tools="find") == "tools are not JSON"
    assert sharegpt(messages, tools="{}") == "tools are not a list"
    assert sharegpt(messages, tools='[{"description": "x"}]') == "a tool has no name"


def test_several_calls_at_once_stand_one_below_the_other() -> None:
    calls = [{"name": "f", "arguments": {"x": "ü"}}, {"name": "g", "arguments": '{"y": 2}'}]
    assert call_text(calls) == 'Action: f\nAction Input: {"x": "ü"}\nAction: g\nAction Input: {"y": 2}'


@pytest.mark.parametrize(
    ("handler", "map_keys", "columns", "message"),
    [
        ("GeneralPretrainHandler", None, ("text",), "not offered.*AlpacaStyleInstructionHandler, Sharegpt"),
        ("", None, ("text",), "--handler-name is missing"),
        (ALPACA, None, ("text", "id"), "no column 'instruction'.*columns found: id, text"),
        (ALPACA, None, ("instruction", "output"), "no column 'input'.*or \"\" for none"),
        (ALPACA, {"promt": "x"}, ALPACA_COLUMNS, "no key 'promt'.*prompt, query, response, system, history"),
        (ALPACA, {"tags": {}}, ALPACA_COLUMNS, "no key 'tags'"),
        (ALPACA, {"response": ""}, ALPACA_COLUMNS, "'response' cannot be left empty"),
        (ALPACA, {"query": 3}, ALPACA_COLUMNS, "must be a name in quotes, got 3"),
        (SHAREGPT, {"tags": {"role": "x"}}, ("conversations",), "no key 'role'.*role_tag"),
        (SHAREGPT, {"tags": {"role_tag": "role"}}, ("conversations",), "tags lack 'content_tag'"),
        (SHAREGPT, {"tags": "role"}, ("conversations",), "tags must be an object"),
    ],
)
def test_a_wrong_handler_key_or_column_is_the_users_to_mend(
    handler: str, map_keys: dict[str, Any] | None, columns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reader_for(handler, map_keys, columns)
