"""How a dataclass field says that it is also a command-line flag: default, help and spelling live together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def flag(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    inverted: bool = False,
    hidden: bool = False,
) -> Any:
    """A dataclass field that `cli.flags` turns into `--name`.

    Args:
        default: value when the flag is absent; `dataclasses.MISSING` makes the flag required.
        name: the flag without dashes where it differs from the field name.
        aliases: further spellings, without the leading dashes.
        inverted: a switch whose presence stores False (`--no-shuffle` for `shuffle`).
        hidden: the field has no flag; only code or a YAML file sets it.
    """
    metadata = {
        "help": help,
        "name": name,
        "aliases": tuple(aliases),
        "choices": tuple(choices) if choices else None,
        "inverted": inverted,
        "hidden": hidden,
        "flag": True,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
