"""One settable dataclass field: its spellings, and how text or a YAML value becomes a value of its type."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from dataclasses import MISSING, dataclass
from typing import Any

_SCALARS: tuple[type, ...] = (bool, int, float, str)


@dataclass(frozen=True)
class Option:
    """A field of a config class that the command line or a YAML file may set."""

    config: type
    field: str
    kind: type  # bool, int, float, str or dict; of the items where `many`
    many: bool
    optional: bool
    default: Any
    help: str
    spellings: tuple[str, ...]  # without dashes, the main one first; empty when only YAML sets it
    choices: tuple[str, ...] | None
    inverted: bool

    @property
    def dest(self) -> str:
        return f"{self.config.__name__}.{self.field}"

    @property
    def flag(self) -> str:
        return f"--{self.spellings[0]}"

    @property
    def required(self) -> bool:
        return self.default is MISSING

    def from_text(self, text: str) -> Any:
        """One word of the command line as a value. Raises ValueError that says what was expected."""
        if self.kind is dict:
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{text!r} is not JSON: {error}") from None
            except (ValueError, RecursionError):  # a number of 5,000 digits, brackets 1,000 deep
                raise ValueError(f"'{text[:60]}...' is not JSON that can be read") from None
            if not isinstance(value, dict):
                raise ValueError(f'{text!r} is not a JSON object such as {{"key": "value"}}')
            return value
        if self.kind is str:
            return self._checked(text)
        try:
            if not text.isascii() or "_" in text or text != text.strip():  # which Python would take: 1_000, \u0663
                raise ValueError
            return self._checked(self.kind(text))
        except ValueError:
            shown = text if len(text) <= 60 else text[:60] + "..."
            raise ValueError(f"{shown!r} is not {_CALLED[self.kind]}") from None

    def from_yaml(self, value: Any) -> Any:
        """The value of one YAML key. Raises ValueError that says what was expected."""
        if value is None and self.optional:
            return None
        if self.many:
            items = value if isinstance(value, list) else [value]
            return tuple(self._scalar_from_yaml(item) for item in items)
        if self.inverted:
            return not self._scalar_from_yaml(value)
        return self._scalar_from_yaml(value)

    def _scalar_from_yaml(self, value: Any) -> Any:
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ValueError("the number is too large") from None
        if self.kind is float and isinstance(value, str):
            return self.from_text(value)  # YAML 1.1 reads 1e-5 as text
        if type(value) is not self.kind:
            advice = "; put it in quotes" if self.kind is str and isinstance(value, (int, float)) else ""
            raise ValueError(f"{reprlib.repr(value)} is not {_CALLED[self.kind]}{advice}")
        return self._checked(value)

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{value!r} holds a NUL, which no file name and no text of a flag may")
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(self.choices)}")
        return value


_CALLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
}


def options_of(config: type) -> list[Option]:
    """Every field of `config` that users can set, in the order of its definition."""
    hints = typing.get_type_hints(config)
    options = []
    for field in dataclasses.fields(config):
        metadata = field.metadata
        is_flag = bool(metadata.get("flag")) and not metadata["hidden"]
        kind, many, optional = _kind_of(hints[field.name])
        if not field.init or not (is_flag or (kind is dict and not metadata.get("flag"))):
            continue
        assert kind is not None, f"{config.__name__}.{field.name}: no command-line form for {hints[field.name]}"
        main = metadata.get("name") or field.name.replace("_", "-")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        inverted = bool(metadata.get("inverted"))
        assert kind is not bool or many or inverted == (default is True), (
            f"{config.__name__}.{field.name}: giving the switch must change its default"
        )
        options.append(
            Option(
                config=config,
                field=field.name,
                kind=kind,
                many=many,
                optional=optional,
                default=default,
                help=metadata.get("help", ""),
                spellings=(main, *metadata.get("aliases", ())) if is_flag else (),
                choices=metadata.get("choices"),
                inverted=inverted,
            )
        )
    return options


def _kind_of(hint: Any) -> tuple[type | None, bool, bool]:
    """Type annotation -> (kind, many, optional); kind is None when there is no command-line form for it."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        if len(members) != 1:
            return None, False, optional
        hint = members[0]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis and arguments[0] in _SCALARS:
        return arguments[0], True, optional
    if hint is dict or origin is dict:
        return dict, False, optional
    return (hint if hint in _SCALARS else None), False, optional
