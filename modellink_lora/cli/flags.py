"""The command line of a job, generated from its config classes: parse once, return only what the user gave.

A flag's name, default and help live in its dataclass field (`config.flag.flag`); nothing is declared twice. Absent
flags are absent from the result, so a job can tell a default from a choice.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn

from modellink_lora.cli import config_file
from modellink_lora.cli.option import Option, options_of
from modellink_lora.config.errors import UserError

_CONFIG_FILE = "config"


@dataclass(frozen=True)
class Accepted:
    """A flag that is taken without effect, and why that is safe.

    `nargs` is 0 for a switch, 1 for one value, or argparse's `?`, `*`, `+`. With `only`, those values are the
    neutral ones and any other is an error.
    """

    nargs: int | str
    reason: str
    only: tuple[str, ...] = ()


def only(value: object, reason: str) -> Accepted:
    """A flag that may be given with its neutral `value` and is refused, for `reason`, with any other."""
    return Accepted(nargs=1, reason=reason, only=(str(value),))


class _Arguments(argparse.ArgumentParser):
    """argparse that reports a mistake as one line, without the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process of a node was given the same line
            print(f"{self.prog}: error: {message.removeprefix('argument ')}", file=sys.stderr)
        sys.exit(2)


class Parser:
    """Flags of several config classes together. Made by `build_parser`."""

    def __init__(
        self,
        arguments: _Arguments,
        options: Sequence[Option],
        refused: Mapping[str, str],
        accepted: Mapping[str, Accepted],
    ) -> None:
        self._arguments = arguments
        self._options = {spelling: option for option in options for spelling in option.spellings}
        self._yaml_only = {o.field.replace("_", "-"): o for o in options if not o.spellings}
        self._configs = list(dict.fromkeys(option.config for option in options))
        self._refused = refused
        self._accepted = accepted
        self._used: list[str] = []

    def parse(self, argv: Sequence[str] | None = None) -> dict[type, dict[str, Any]]:
        """What the user gave, per config class. Prints one line and exits with 2 on a mistake."""
        known, unknown = self._arguments.parse_known_args(argv)
        if unknown:
            self._arguments.error(self._explain_unknown(unknown))
        given = vars(known)
        path = given.pop(_CONFIG_FILE, None)
        self._used = list(dict.fromkeys(given.pop("accepted", [])))
        if path is not None:
            try:
                given = self._from_file(path) | given
            except UserError as error:
                self._arguments.error(str(error))
        missing = [o.flag for o in self._options.values() if o.required and o.dest not in given]
        if missing:
            self._arguments.error(f"{', '.join(dict.fromkeys(missing))} must be given")
        result: dict[type, dict[str, Any]] = {config: {} for config in self._configs}
        for option in (*self._options.values(), *self._yaml_only.values()):
            if option.dest in given:
                value = given[option.dest]
                if value == [] and not option.many:  # what argparse makes of `--flag=--`
                    self._arguments.error(f"{option.flag}: expected one argument")
                result[option.config][option.field] = tuple(value) if isinstance(value, list) else value
        return result

    def report_accepted(self, say: Callable[[str], None]) -> None:
        """Say once for each flag that was taken without effect why it has none."""
        for name in self._used:
            say(f"--{name} has no effect: {self._accepted[name].reason}")

    def error(self, message: str) -> NoReturn:
        """Report a mistake that only the values together show, as the parser reports its own."""
        self._arguments.error(message)

    def _from_file(self, path: str) -> dict[str, Any]:
        """Values of the YAML file by `Option.dest`."""
        values: dict[str, Any] = {}
        main_names: dict[str, str] = {}

        def setter(name: str) -> Callable[[Any], None] | None:
            option = self._options.get(name) or self._yaml_only.get(name)
            if option is not None:
                return lambda value: store(name, option, value)
            if name in self._refused:
                return lambda value: self._refuse_in_file(name, value)
            if name in self._accepted:
                return lambda value: self._accept_in_file(name, value)
            return None

        def store(name: str, option: Option, value: Any) -> None:
            if option.dest in values:
                raise ValueError(f"says the same as {main_names[option.dest]}, which is given too")
            values[option.dest], main_names[option.dest] = option.from_yaml(value), name

        config_file.apply(path, config_file.read_mapping(path), setter, self._hint)
        return values

    def _refuse_in_file(self, name: str, value: Any) -> None:
        if value is not False and value is not None:
            raise ValueError(self._refused[name])

    def _accept_in_file(self, name: str, value: Any) -> None:
        neutral = self._accepted[name].only
        if neutral and str(value) not in neutral:
            raise ValueError(f"{value}: {self._accepted[name].reason}")
        if not neutral and value is not False and value is not None and name not in self._used:
            self._used.append(name)

    def _explain_unknown(self, words: Sequence[str]) -> str:
        flags = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
        if not flags:
            return f"unexpected argument {words[0]!r}: every value belongs to a flag"
        return "; ".join(f"unknown flag {flag}{self._hint(flag.lstrip('-'))}" for flag in dict.fromkeys(flags))

    def _hint(self, name: str) -> str:
        """`, did you mean --x?` for the known flags closest to `name`, or nothing."""
        known = [*self._options, *self._yaml_only, *self._accepted, _CONFIG_FILE]
        close = difflib.get_close_matches(name.replace("_", "-"), known, n=2, cutoff=0.75)
        return f" (did you mean {' or '.join('--' + match for match in close)}?)" if close else ""


def build_parser(
    prog: str,
    description: str,
    configs: Sequence[type],
    *,
    refused: Mapping[str, str] | None = None,
    accepted: Mapping[str, Accepted] | None = None,
) -> Parser:
    """The parser of one job.

    Args:
        configs: dataclasses whose fields made with `config.flag.flag` become flags; `--help` has a group for each.
        refused: flag -> why it cannot be used and what to do instead.
        accepted: flag -> a flag that is taken without effect.
    """
    refused = {name.lstrip("-"): reason for name, reason in (refused or {}).items()}
    accepted = {name.lstrip("-"): row for name, row in (accepted or {}).items()}
    options = [option for config in configs for option in options_of(config)]
    _check_unique([*(s for o in options for s in o.spellings), *refused, *accepted, _CONFIG_FILE])
    arguments = _Arguments(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
        usage=f"{prog} [--flag value ...]",
    )
    arguments.add_argument(f"--{_CONFIG_FILE}", metavar="FILE.yaml", help="flags from a YAML mapping; typed flags win")
    for config in configs:
        group = arguments.add_argument_group((config.__doc__ or config.__name__).strip().splitlines()[0])
        for option in (option for option in options if option.config is config and option.spellings):
            _add_option(group, option)
    _add_accepted(arguments, accepted)
    for name, reason in refused.items():
        arguments.add_argument(f"--{name}", nargs="*", action=_Refuse, reason=reason, help=argparse.SUPPRESS)
    return Parser(arguments, options, refused, accepted)


def _check_unique(names: Sequence[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"declared twice: {', '.join(sorted('--' + name for name in twice))}"


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    names = [f"--{spelling}" for spelling in option.spellings]
    help_text = (option.help + _describe_default(option)).replace("%", "%%")
    if option.kind is bool and not option.many:
        action = "store_false" if option.inverted else "store_true"
        # store_true brings its own default; SUPPRESS keeps an absent switch absent
        group.add_argument(*names, dest=option.dest, action=action, default=argparse.SUPPRESS, help=help_text)
        return
    placeholder = "{" + ",".join(option.choices) + "}" if option.choices else _PLACEHOLDERS[option.kind]
    group.add_argument(
        *names,
        dest=option.dest,
        nargs="+" if option.many else None,
        type=_for_argparse(option.from_text),
        metavar=placeholder,
        help=help_text,
    )


_PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}


def _describe_default(option: Option) -> str:
    if option.default is MISSING:
        return " (required)"
    says_it_itself = "default" in option.help or option.default in (None, (), "")
    if says_it_itself or isinstance(option.default, bool) or (option.kind is int and option.default == 0):
        return ""  # a whole number 0 stands for "not set, worked out later" in the config classes
    value = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
    return f" (default {value})"


def _for_argparse(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def converter(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converter


def _add_accepted(arguments: argparse.ArgumentParser, accepted: Mapping[str, Accepted]) -> None:
    group = arguments.add_argument_group("Taken without effect, so that existing scripts run")
    for name, row in accepted.items():
        nargs = None if row.nargs == 1 else row.nargs
        help_text = (f"only {', '.join(row.only)}: " if row.only else "") + row.reason
        group.add_argument(
            f"--{name}", nargs=nargs, action=_Accept, row=row, metavar="VALUE", help=help_text.replace("%", "%%")
        )


class _Refuse(argparse.Action):
    """Ends the run with the reason why this flag cannot be used."""

    def __init__(self, *args: Any, reason: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reason = reason

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string}: {self._reason}")


class _Accept(argparse.Action):
    """Notes that a flag without effect was used; refuses values that are not neutral."""

    def __init__(self, *args: Any, row: Accepted, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._row = row

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert option_string is not None
        if self._row.only:
            if values not in self._row.only:
                parser.error(f"{option_string} {values}: {self._row.reason}")
            return
        used = getattr(namespace, "accepted", [])
        namespace.accepted = [*used, option_string.removeprefix("--")]
