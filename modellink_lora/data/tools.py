"""How tools are written for the model: a list of what there is behind the system text, and the calls it makes.

A call is the ReAct pair of lines `Action: NAME` and `Action Input: {JSON}`; the list tells the model to use that form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modellink_lora.config.document import is_deeper


def describe_tools(value: Any) -> str:
    """Text that lists the tools in `value` (JSON text, or the list itself). Raises ValueError saying what is wrong."""
    tools = _parsed(value, "tools are") if isinstance(value, str) else value
    if not isinstance(tools, Sequence):
        raise ValueError("tools are not a list")
    if not tools:
        return ""
    functions = [_function(tool) for tool in tools]
    listing = "".join(_entry(function) for function in functions)
    names = ", ".join(str(function["name"]) for function in functions)
    return (
        f"These tools can be called:\n{listing}"
        "To call one, answer with exactly these two lines:\n"
        f"Action: the name of the tool, one of {names}\n"
        'Action Input: the arguments as one JSON object, such as {"city": "Oslo", "days": 2}\n'
    )


def call_text(value: Any) -> str:
    """The lines of one call, or of a list of calls one below the other. Raises ValueError saying what is wrong."""
    calls = _parsed(value, "the function call is") if isinstance(value, str) else value
    calls = [_inner(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not calls or not all(map(_has_name, calls)) or not all("arguments" in call for call in calls):
        raise ValueError("the function call has no name and arguments")
    return "\n".join(f"Action: {call['name']}\nAction Input: {_arguments(call['arguments'])}" for call in calls)


def _arguments(value: Any) -> str:
    """One JSON object; arguments that came as text are the JSON text itself."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "{}"
    arguments = _parsed(value, "the arguments of a function call are") if isinstance(value, str) else value
    if not isinstance(arguments, Mapping):
        raise ValueError("the arguments of a function call are not an object")
    written = _json(arguments)
    return value if isinstance(value, str) else written


def _inner(entry: Any) -> Any:
    """What a tool or a call says itself; OpenAI's lists keep it below the key `function`."""
    inner = entry.get("function") if isinstance(entry, Mapping) else None
    return entry if inner is None else inner


def _has_name(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and bool(entry["name"])


def _function(tool: Any) -> Mapping[str, Any]:
    inner = _inner(tool)
    if not _has_name(inner):
        raise ValueError("a tool has no name")
    assert isinstance(inner, Mapping)
    return inner


def _entry(function: Mapping[str, Any]) -> str:
    """
    > Tool Name: search
    Tool Description: Find recipes
    Tool Args:
      - ingredients (array of string, required): what to use
    """
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {} if isinstance(parameters, Mapping) else {}
    if not isinstance(properties, Mapping):
        raise ValueError("the parameters of a tool are not an object")
    required = parameters.get("required") or [] if isinstance(parameters, Mapping) else []
    if not isinstance(required, list):
        raise ValueError("what a tool requires is not a list")
    lines = [f"> Tool Name: {function['name']}", f"Tool Description: {_description(function)}", "Tool Args:"]
    for name, about in properties.items():
        if about is None:  # no schema: another tool's parameter, where tools were kept as structs of one type
            continue
        about = about if isinstance(about, Mapping) else {}
        kind = _kind(about) or "any"
        items = about.get("items")
        if isinstance(items, Mapping) and _kind(items):
            kind += f" of {_kind(items)}"
        must = ", required" if name in required or about.get("required") is True else ""  # true: old JSON Schema
        choices = f"; one of {_json(about['enum'])}" if about.get("enum") else ""
        lines.append(f"  - {name} ({kind}{must}): {_description(about)}{choices}")
    return "\n".join(lines) + "\n"


def _kind(about: Mapping[str, Any]) -> str:
    kind = about.get("type") or ""
    if not isinstance(kind, str) and not (isinstance(kind, list) and all(isinstance(one, str) for one in kind)):
        raise ValueError("a type of a parameter is not text")
    return str(kind)


def _description(about: Mapping[str, Any]) -> str:
    text = about.get("description") or ""
    if not isinstance(text, str):
        raise ValueError("a description of a tool is not text")
    return text


def _parsed(text: str, what: str) -> Any:
    """JSON `text`. Raises ValueError beginning with `what`, such as `tools are`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{what} not JSON") from None
    except RecursionError:
        raise ValueError(f"{what} nested too deeply") from None
    except ValueError:
        raise ValueError(f"{what} not readable: a number of more than 4,300 digits") from None
    if is_deeper(value):
        raise ValueError(f"{what} nested too deeply")
    return value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # dates, decimals, bytes and NaN of a parquet file
        raise ValueError("tools hold a value that JSON has no form for") from None
