"""Records with tools: a tool has its own parameters only, and a call beside text is trained with the text.

Reported as modelscope/ms-swift#10125 (parameters of other tools in the prompt), vllm-project/speculators#561 (calls
lost in silence), axolotl-ai-cloud/axolotl#3974 (arguments that are no JSON).
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modellink_lora.data.handlers import reader_for
from modellink_lora.data.prompt import Conversation
from modellink_lora.data.records import open_records
from modellink_lora.data.tools import describe_tools

SHAREGPT = "SharegptStyleInstructionHandler"
OPENAI = {
    "messages": "messages",
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
             "observation_tag": "tool", "system_tag": "system"},
}  # fmt: skip


def read(rows: list[dict[str, Any]], folder: Path, kind: str, map_keys: dict[str, Any]) -> list[Conversation | str]:
    """The rows through a file and the handler."""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    elif kind == "json of parquet":  # as `to_json` of the datasets library writes it
        kind = "json"
        (folder / "d.json").write_text(json.dumps(pa.Table.from_pylist(rows).to_pylist()))
    else:
        (folder / f"d.{kind}").write_text(json.dumps(rows))
    records = open_records(str(folder / f"d.{kind}"))
    reader = reader_for(SHAREGPT, map_keys, records.columns())
    return [reader.read(record.row) for record in records.rows(reader.columns)]


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": key} for key in parameters}
    return {"name": name, "description": name,
            "parameters": {"type": "object", "properties": properties, "required": list(parameters)}}  # fmt: skip


TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("kind", ["parquet", "json of parquet"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tool_of_a_struct_has_its_own_parameters_only(kind: str, wrapped: bool, tmp_path: Path) -> None:
    lists = [[tool("weather", "city")], [tool("add", "x", "y"), tool("now")]]
    if wrapped:
        lists = [[{"type": "function", "function": one} for one in tools] for tools in lists]
    rows = [{"conversations": TALK, "tools": tools} for tools in lists]
    found = read(rows, tmp_path, kind, {"tools": "tools"})
    assert [one.tools if isinstance(one, Conversation) else one for one in found] == list(map(describe_tools, lists))
    assert "Tool Args:\n  - city (string, required): city\nTo call" in describe_tools(lists[0])


def test_a_map_of_parquet_is_a_dict(tmp_path: Path) -> None:
    about = pa.struct({"type": pa.string(), "description": pa.string()})
    parameters = pa.struct({"type": pa.string(), "properties": pa.map_(pa.string(), about)})
    tools = pa.list_(pa.struct({"name": pa.string(), "parameters": parameters}))
    properties = [("city", {"type": "string", "description": "where"})]
    value = [[{"name": "f", "parameters": {"type": "object", "properties": properties}}]]
    table = pa.table({"conversations": pa.array([TALK]), "tools": pa.array(value, tools)})
    pq.write_table(table, tmp_path / "d.parquet")
    (record,) = open_records(str(tmp_path / "d.parquet")).rows(["tools"])
    assert "  - city (string): where\n" in describe_tools(record.row["tools"])


def calling(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, **more},
            {"role": "tool", "content": "12 C"}, {"role": "assistant", "content": "a"}]  # fmt: skip


CALL = 'Action: weather\nAction Input: {"city": "Oslo"}'
FUNCTION = {"name": "weather", "arguments": '{"city": "Oslo"}'}


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("I look.", {"tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}, f"I look.\n{CALL}"),
        (None, {"tool_calls": [{"type": "function", "function": FUNCTION}]}, CALL),
        ("", {"tool_calls": [FUNCTION]}, CALL),
        (" \n", {"tool_calls": [{**FUNCTION, "arguments": {"city": "Oslo"}}]}, CALL),
        ("I look.", {"tool_calls": json.dumps([{"function": FUNCTION}])}, f"I look.\n{CALL}"),
        ("Both.", {"tool_calls": [FUNCTION, FUNCTION]}, f"Both.\n{CALL}\n{CALL}"),
        (None, {"function_call": FUNCTION}, CALL),
        ("I look.", {"function_call": {**FUNCTION, "arguments": {"city": "Oslo"}}}, f"I look.\n{CALL}"),
        ("Now.", {"tool_calls": [{"name": "now", "arguments": ""}]}, "Now.\nAction: now\nAction Input: {}"),
        ("No call.", {"tool_calls": [], "function_call": None}, "No call."),
        ("No call.", {"tool_calls": "[]"}, "No call."),
    ],
)
def test_calls_are_trained_behind_the_text(
    content: Any, more: dict[str, Any], said: str, kind: str, tmp_path: Path
) -> None:
    (found,) = read([{"messages": calling(content, **more)}], tmp_path, kind, OPENAI)
    assert isinstance(found, Conversation), found
    assert [(message.content, message.trained) for message in found.messages[1::2]] == [(said, True), ("a", True)]
    assert found.messages[1].role == ("assistant" if said == "No call." else "function")


def test_arguments_of_a_struct_are_those_of_the_call(tmp_path: Path) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "add", "arguments": {"x": 1}}]
    found = read([{"messages": calling("", tool_calls=[call])} for call in calls], tmp_path, "parquet", OPENAI)
    said = [one.messages[1].content for one in found if isinstance(one, Conversation)]
    assert said == [CALL, 'Action: add\nAction Input: {"x": 1}']


def test_results_of_several_calls_stand_one_below_the_other(tmp_path: Path) -> None:
    messages = calling("", tool_calls=[FUNCTION, FUNCTION])
    messages.insert(3, {"role": "tool", "content": "13 C"})
    (found,) = read([{"messages": messages}], tmp_path, "json", OPENAI)
    assert isinstance(found, Conversation)
    assert [message.content for message in found.messages] == ["q", f"{CALL}\n{CALL}", "12 C\n13 C", "a"]


def test_a_call_that_is_switched_off_is_not_trained(tmp_path: Path) -> None:
    (found,) = read([{"messages": calling("t", tool_calls=[FUNCTION], weight=0)}], tmp_path, "json", OPENAI)
    assert isinstance(found, Conversation)
    assert [message.trained for message in found.messages[1::2]] == [False, True]


DEEP, DIGITS = "[" * 100_000 + "]" * 100_000, "1" * 5000


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "the function call has no name and arguments"),
        ({"tool_calls": [{"name": None, "arguments": "{}"}]}, "the function call has no name and arguments"),
        ({"tool_calls": ["weather"]}, "the function call has no name and arguments"),
        ({"tool_calls": "weather(Oslo)"}, "the function call is not JSON"),
        ({"tool_calls": DEEP}, "the function call is nested too deeply"),
        ({"tool_calls": "[" * 200 + "]" * 200}, "the function call is nested too deeply"),
        ({"tool_calls": f"[{DIGITS}]"}, "the function call is not readable: a number of more than 4,300 digits"),
        ({"tool_calls": [{"name": "f", "arguments": "city=Oslo"}]}, "the arguments of a function call are not JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "the arguments of a function call are not an object"),
        ({"tool_calls": [{"name": "f", "arguments": 5}]}, "the arguments of a function call are not an object"),
        ({"tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}, "tools hold a value that JSON has no form for"),
    ],
)
def test_a_call_that_cannot_be_written_drops_the_record(more: dict[str, Any], reason: str) -> None:
    reader = reader_for(SHAREGPT, OPENAI, ("messages",))
    assert reader.read({"messages": calling("text", **more)}) == reason


def test_a_question_that_calls_a_tool_drops_the_record() -> None:
    messages = calling("text")
    messages[0]["tool_calls"] = [FUNCTION]
    assert reader_for(SHAREGPT, OPENAI, ("messages",)).read({"messages": messages}) == "a message of 'user' calls tools"


def test_what_else_a_message_holds_is_named() -> None:
    reader = reader_for(SHAREGPT, OPENAI, ("messages",))
    messages = calling("text", reasoning_content="because", audio=None, tool_calls=[FUNCTION], weight=1)
    assert reader.unused_keys({"messages": messages}) == {"reasoning_content"}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": {"a": {}}, "required": True}, "what a tool requires is not a list"),
        ({"properties": ["a"]}, "the parameters of a tool are not an object"),
        ({"properties": {"a": {"description": datetime.date(2020, 1, 1)}}}, "a description of a tool is not text"),
        ({"properties": {"a": {"type": b"string"}}}, "a type of a parameter is not text"),
        ({"properties": {"a": {"type": "array", "items": {"type": 5}}}}, "a type of a parameter is not text"),
        ({"properties": {"a": {"enum": [float("nan")]}}}, "tools hold a value that JSON has no form for"),
        ({"properties": {"a": {"enum": [b"x"]}}}, "tools hold a value that JSON has no form for"),
    ],
)
def test_a_schema_that_cannot_be_written_drops_the_record(parameters: dict[str, Any], reason: str) -> None:
    reader = reader_for(SHAREGPT, {"tools": "tools"}, ("conversations", "tools"))
    row = {"conversations": TALK, "tools": [{"name": "f", "parameters": parameters}]}
    assert reader.read(row) == reason


def test_a_parameter_may_say_itself_that_it_is_required() -> None:
    parameters = {"properties": {"a": {"type": "string", "required": True}, "b": {"type": "string", "required": False},
                                 "required": {"type": "boolean"}}}  # fmt: skip
    assert "  - a (string, required): \n  - b (string): \n  - required (boolean): \n" in describe_tools(
        [{"name": "f", "parameters": parameters}]
    )
