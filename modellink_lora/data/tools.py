"""How tools are written for the model: a list of what there is behind the system text, and the calls it makes.

A call is the ReAct pair of lines `Action: NAME` and `Action Input: {JSON}`; the list tells the model to use that form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def describe_tools(value: Any) -> str:
    """Text that lists the tools in `value` (JSON text, or the list itself). Raises ValueError saying what is wrong."""
    tools = _parsed(value, "tools") if isinstance(value, str) else value
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
    calls = _parsed(value, "the function call") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls):
        raise ValueError("the function call has no name and arguments")
    return "\n".join(f"Action: {call['name']}\nAction Input: {_json(call['arguments'])}" for call in calls)


def _function(tool: Any) -> Mapping[str, Any]:
    """The description proper; OpenAI's lists keep it below the key `function`."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError("a tool has no name")
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
    lines = [f"> Tool Name: {function['name']}", f"Tool Description: {function.get('description') or ''}", "Tool Args:"]
    for name, about in properties.items():
        about = about if isinstance(about, Mapping) else {}
        kind = str(about.get("type") or "any")
        items = about.get("items")
        if isinstance(items, Mapping) and items.get("type"):
            kind += f" of {items['type']}"
        must = ", required" if name in required else ""
        choices = f"; one of {_json(about['enum'])}" if about.get("enum") else ""
        lines.append(f"  - {name} ({kind}{must}): {about.get('description') or ''}{choices}")
    return "\n".join(lines) + "\n"


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} are not JSON" if what == "tools" else f"{what} is not JSON") from None


def _json(value: Any) -> str:
    # arguments that came as text are the JSON text itself
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # dates, decimals and bytes of a parquet file
        raise ValueError("tools hold a value that JSON has no form for") from None
