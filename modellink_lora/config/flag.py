"""How a dataclass field says that it is also a command-line flag: default, help, spelling and range live together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from modellink_lora.config.errors import UserError

LARGEST_INT = 2**31 - 1  # of a whole number without a limit of its own
LARGEST_SEED = 2**32 - 1  # numpy's
MOST_WORKERS = 1024
MINUTES_OF_A_YEAR = 525_600


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be, besides finite."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`at least 0 and below 1`; `a finite number` where there is no limit."""
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        words = [f"{word} {limit:.17g}" for word, limit in limits.items() if limit is not None]
        return " and ".join(words) or "a finite number"


def flag(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    inverted: bool = False,
    hidden: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that `cli.flags` turns into `--name`.

    Args:
        default: value when the flag is absent; `dataclasses.MISSING` makes the flag required.
        name: the flag without dashes where it differs from the field name.
        aliases: further spellings, without the leading dashes.
        inverted: a switch whose presence stores False (`--no-shuffle` for `shuffle`).
        hidden: the field has no flag; only code or a YAML file sets it.
        at_least, above, at_most, below: limits of a number, which `check_ranges` compares. Numbers are finite, and
            whole ones at most LARGEST_INT, in any case. A default outside of them means that the flag must be given.
    """
    metadata = {
        "help": help,
        "name": name,
        "aliases": tuple(aliases),
        "choices": tuple(choices) if choices else None,
        "inverted": inverted,
        "hidden": hidden,
        "flag": True,
        "range": Range(at_least, above, at_most, below),
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(config: Any) -> None:
    """Compare the numbers of a config with the ranges of its fields; the first thing its `__post_init__` does.

    Raises:
        UserError: one is not finite or out of range, or is no number at all.
    """
    for field in dataclasses.fields(config):
        kind = str(field.type).removesuffix(" | None")
        value = getattr(config, field.name)
        if "range" not in field.metadata or kind not in ("int", "float") or (value is None and kind != field.type):
            continue
        spelling = "--" + (field.metadata["name"] or field.name.replace("_", "-"))
        if value == field.default and not field.metadata["range"].holds(value):
            raise UserError(f"{spelling} is missing: give a number that is {field.metadata['range']}")
        check_number(spelling, value, int if kind == "int" else float, field.metadata["range"])


def check_number(where: str, value: Any, kind: type, allowed: Range) -> None:
    """Raise UserError, which begins with `where`, for a value of another kind (int, float) or out of range."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UserError(f"{where} {value!r}: must be {'a whole number' if kind is int else 'a number'}")
    if not allowed.holds(value):
        raise UserError(f"{where} {value}: must be {allowed}")
    if kind is int and allowed.at_most is None and value > LARGEST_INT:
        raise UserError(f"{where} {value}: must be at most {LARGEST_INT}")
