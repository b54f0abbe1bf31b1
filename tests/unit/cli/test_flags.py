"""Flags generated from config classes: what parses to what, and the one line that each mistake gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.cli.accepted import ACCEPTED, REFUSED
from modellink_lora.cli.flags import Accepted, Parser, build_parser, only
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.flag import flag
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Kitchen:
    """Cooking

    Only the line above is the heading."""

    pot: str = flag(dataclasses.MISSING, "which pot")
    heat: float = flag(1.5, "how hot, in %", aliases=("temperature",))
    guests: int | None = flag(None, "how many come")
    stir: bool = flag(False, "keep it moving")
    salt: bool = flag(True, "leave out the salt", name="no-salt", inverted=True)
    style: str = flag("slow", "manner", choices=("slow", "fast"))
    herbs: tuple[str, ...] = flag((), "any number of them")
    minutes: tuple[int, ...] = flag((), "of each step")
    names: dict[str, Any] | None = flag(None, "new names")
    secret: int = flag(7, "not for users", hidden=True)
    weights: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def parser() -> Parser:
    return build_parser(
        "cook.py",
        "Cooks.",
        [Kitchen],
        refused={"--microwave": "there is none; use --heat"},
        accepted={"apron": Accepted(0, "it changes no taste"), "cooks": only(1, "one cook only; call twice")},
    )


def given(parser: Parser, *words: str) -> dict[str, Any]:
    return parser.parse(["--pot", "iron", *words])[Kitchen]


def mistake(parser: Parser, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parser.parse(words)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("cook.py: error: ")
    return err.removeprefix("cook.py: error: ").strip()


def write(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--heat 2e2", {"heat": 200.0}),
        ("--temperature 3", {"heat": 3.0}),
        ("--guests 4", {"guests": 4}),
        ("--stir", {"stir": True}),
        ("--no-salt", {"salt": False}),
        ("--style fast", {"style": "fast"}),
        ("--herbs dill sage --minutes 3 5", {"herbs": ("dill", "sage"), "minutes": (3, 5)}),
        ('--names {"a":"b"}', {"names": {"a": "b"}}),
        ("--apron --cooks 1", {}),
    ],
)
def test_only_what_was_given_is_returned_with_the_type_of_its_field(
    parser: Parser, words: str, expected: dict[str, Any]
) -> None:
    result = given(parser, *words.split())
    assert result == {"pot": "iron"} | expected
    assert {name: type(value) for name, value in result.items() if name in expected} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--pot iron --heat warm", "--heat/--temperature: 'warm' is not a number"),
        ("--pot iron --guests 2.5", "--guests: '2.5' is not a whole number"),
        ("--pot iron --style raw", "--style: 'raw' is not one of slow, fast"),
        ("--pot iron --names [1]", """--names: '[1]' is not a JSON object such as {"key": "value"}"""),
        ("--pot", "--pot: expected one argument"),
        ("--heat 1", "--pot must be given"),
        ("--pot iron --guest 3", "unknown flag --guest (did you mean --guests?)"),
        ("--pot iron --no_salt", "unknown flag --no_salt (did you mean --no-salt?)"),
        ("--pot iron --xylophone=3", "unknown flag --xylophone"),
        ("--pot iron --secret 3", "unknown flag --secret"),
        ("--pot iron tin", "unexpected argument 'tin': every value belongs to a flag"),
        ("--pot iron --microwave", "--microwave: there is none; use --heat"),
        ("--pot iron --microwave 1 2", "--microwave: there is none; use --heat"),
        ("--microwave=9", "--microwave: there is none; use --heat"),
        ("--pot iron --cooks 2", "--cooks 2: one cook only; call twice"),
    ],
)
def test_a_mistake_gives_one_line_that_names_the_flag(
    parser: Parser, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    assert mistake(parser, capsys, *words.split()) == line


def test_flags_are_not_abbreviated(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(parser, capsys, "--pot", "iron", "--sti") == "unknown flag --sti (did you mean --stir?)"


def test_yaml_stands_under_the_typed_flags(parser: Parser, tmp_path: Path) -> None:
    path = write(
        tmp_path, "pot: tin\nheat: 1e2\nno_salt: true\nherbs: [dill]\nminutes: 4\nweights: {egg: 2}\nguests:\n"
    )
    assert parser.parse(["--config", path, "--pot", "iron", "--herbs", "sage"])[Kitchen] == {
        "pot": "iron",
        "heat": 100.0,
        "salt": False,
        "herbs": ("sage",),
        "minutes": (4,),
        "weights": {"egg": 2},
        "guests": None,
    }


def test_an_inverted_switch_given_as_false_keeps_the_default(parser: Parser, tmp_path: Path) -> None:
    assert given(parser, "--config", write(tmp_path, "no-salt: false\nstir: false\n")) == {
        "pot": "iron",
        "salt": True,
        "stir": False,
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("fork: 1", "unknown key fork"),
        ("guest: 1", "unknown key guest (did you mean --guests?)"),
        ("secret: 1", "unknown key secret"),
        ("guests: many", "guests: 'many' is not a whole number"),
        ("guests: true", "guests: True is not a whole number"),
        ("stir: 1", "stir: 1 is not true or false"),
        ("pot: 5", "pot: 5 is not text; put it in quotes"),
        ("pot:", "pot: None is not text"),
        ("style: raw", "style: 'raw' is not one of slow, fast"),
        ("minutes: [1, two]", "minutes: 'two' is not a whole number"),
        ("heat: 1\ntemperature: 2", "temperature: says the same as heat, which is given too"),
        ("no-salt: true\nno_salt: true", "no-salt is given twice (line 2)"),
        ("microwave: 1", "microwave: there is none; use --heat"),
        ("cooks: 2", "cooks: 2: one cook only; call twice"),
        ("- pot", "must hold one mapping, a line per flag such as `lora-r: 16`"),
    ],
)
def test_a_mistake_in_the_yaml_file_names_file_and_key(
    parser: Parser, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, line: str
) -> None:
    path = write(tmp_path, text)
    assert mistake(parser, capsys, "--config", path) == f"--config {path}: {line}"


def test_a_config_file_that_cannot_be_read_or_is_not_yaml_is_named(
    parser: Parser, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    absent = str(tmp_path / "absent.yaml")
    assert (
        mistake(parser, capsys, "--config", absent) == f"--config {absent}: cannot be read: No such file or directory"
    )
    assert "is not YAML" in mistake(parser, capsys, "--config", write(tmp_path, "a: [1"))


def test_flags_without_effect_are_reported_once_each_with_their_reason(parser: Parser, tmp_path: Path) -> None:
    said: list[str] = []
    given(parser, "--apron", "--apron", "--cooks", "1", "--config", write(tmp_path, "apron: true"))
    parser.report_accepted(said.append)
    assert said == ["--apron has no effect: it changes no taste"]


def test_help_groups_by_config_and_shows_defaults(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parser.parse(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert "\nCooking:\n" in text and "Only the line above" not in text
    assert "which pot (required)" in text and "how hot, in % (default 1.5)" in text
    assert "it changes no taste" in text and "--microwave" not in text and "--secret" not in text


def test_other_processes_of_a_node_leave_the_line_to_the_first(
    parser: Parser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as exit:
        parser.parse(["--nonsense"])
    assert exit.value.code == 2 and capsys.readouterr().err == ""


def test_a_flag_in_two_tables_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="declared twice: --stir"):
        build_parser("cook.py", "Cooks.", [Kitchen], refused={"stir": "no"})


def test_the_training_tables_name_no_flag_of_the_model_or_the_adapter() -> None:
    parser = build_parser("t", "t", [ModelConfig, ParallelConfig, LoraConfig], refused=REFUSED, accepted=ACCEPTED)
    said: list[str] = []
    parsed = parser.parse(
        ["--local_rank", "2", "--local-rank=1", "--jit-compile", "--swiglu", "--context-parallel-size", "1"]
    )
    parser.report_accepted(said.append)
    assert parsed[ModelConfig] == {"swiglu": True}
    assert [line.split()[0] for line in said] == ["--local_rank", "--local-rank", "--jit-compile"]
