"""JSON documents of others, read into declared types: the value, or one line that names the file, the key and the type.

Every JSON file this program reads goes through here, so that no reader checks types by hand. What is measured is
written through here too: JSON has neither NaN nor infinity, and most readers refuse a file that holds one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

from modellink_lora.config.errors import UserError

T = TypeVar("T")
_MOST_MERGED = 10_000  # entries of one mapping; each line of nested merges can multiply them


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`. Raises UserError when it cannot be opened or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows programs begin files with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8, or copy it again") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_document(path: Path, kind: type[T], *, closed: bool = False) -> T:
    """The JSON document in `path` as a `kind`. Raises UserError as `read_text` and `parse_document` do."""
    return parse_document(read_text(path), kind, where=str(path), closed=closed)


def parse_document(text: str | bytes, kind: type[T], *, where: str, closed: bool = False) -> T:
    """JSON `text` as a `kind`; see `typed`.

    NaN and Infinity are read as Python's json reads them; what takes a number checks its range.

    Raises:
        UserError: the text is not JSON, an object gives a key two values, or `typed` refuses it.
    """
    try:
        document = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, bad UTF-8, an integer of 5,000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise UserError(f"{where}: not valid JSON ({reason})") from None
    if not is_unicode(json.dumps(document, ensure_ascii=False)):  # written as \\ud800, which JSON's grammar allows
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character")
    return typed(document, kind, where=where, closed=closed)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a document. Which of two values is meant differs between programs; equal ones are harmless."""
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if value != made[key]:
                raise ValueError(f"the key {key!r} is given twice: {str(value)[:40]} and {str(made[key])[:40]}")
    return made


def parse_yaml(text: str) -> Any:
    """YAML `text` as plain values. Raises ValueError with the reason in one line."""
    import yaml  # importing the configs alone needs the standard library only

    class Loader(yaml.SafeLoader):
        """Plain values only, and no mapping that merge keys (`<<`) blow up."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            if len(node.value) > _MOST_MERGED:
                line = node.start_mark.line + 1
                raise ValueError(f"merge keys make more than {_MOST_MERGED} entries of the mapping in line {line}")

    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 32nd of a month
        raise ValueError(" ".join(str(error).split()) or "damaged") from None


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """`value`, made of dicts, lists and scalars, as JSON text; floats that are not finite are null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_unicode(text: str) -> bool:
    """Whether every character of `text` is one, and not half of a surrogate pair, which nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_deeper(value: Any, levels: int = 100) -> bool:
    """Whether lists and dicts are nested more than `levels` deep in `value`, far more than any data need.

    Pickling, printing and writing a value recurse once or more a level, and Python's recursion ends at about 1,000.
    """
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True


def typed(value: Any, kind: type[T], *, where: str, closed: bool = False) -> T:
    """`value`, made of dicts, lists and scalars, as a `kind`: a dataclass, a TypedDict, `dict[str, int]`, ...

    Nothing is coerced but an int to a float. What a dataclass's `__post_init__` refuses is refused here.

    Args:
        where: what holds the value, a file as a rule; messages begin with it.
        closed: of a dataclass, refuse keys that are not fields instead of ignoring them.
    Raises:
        UserError: a value of another type, a missing key, or with `closed` an unknown one.
    """
    import msgspec  # importing the configs alone needs the standard library only

    if closed and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = [field.name for field in dataclasses.fields(kind)]
        if unknown := sorted(str(key) for key in value if key not in known):
            raise UserError(f"{where}: key {unknown[0]!r} is not known here; known are {', '.join(known)}")
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"{where}: {_explained(str(error))}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character") from None


def _explained(message: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a.b[0]`" in the words of the other messages."""
    problem, _, place = message.partition(" - at ")
    key = re.sub(r"\[\.\.\.\]", ".*", place.replace("`", "")).replace("key in $", "a key").removeprefix("$").lstrip(".")
    problem = problem.replace("`", "").replace("array", "list").replace("null", "nothing")
    if missing := re.fullmatch(r"Object missing required field (.+)", problem):
        return f"lacks {key + '.' if key else ''}{missing[1]}"
    problem = problem[:1].lower() + problem[1:]
    return f"{key}: {problem}" if key else problem
