"""JSON documents of others: the value, or one line that names file, key and type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.config.document import parse_document, read_document, typed
from modellink_lora.config.errors import UserError


@dataclass(frozen=True)
class Inner:
    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError("rank: must be at least 1")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    sizes: tuple[float, ...] = ()


def test_a_document_becomes_the_declared_types() -> None:
    found = parse_document('{"name": "n", "inner": {"rank": 4}, "sizes": [1, 2.5], "more": 0}', Outer, where="f")
    assert found == Outer("n", Inner(4), (1.0, 2.5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "f: not valid JSON"),
        ("1" * 5000, "f: not valid JSON"),
        ("[" * 100_000, "f: not valid JSON (nested too deeply)"),
        ('{"name": "n", "sizes": [], "sizes": [1]}', "f: not valid JSON (the key 'sizes' is given twice: [] and [1])"),
        ("[]", "f: expected object, got list"),
        ("{}", "f: lacks name"),
        ('{"name": 1}', "f: name: expected str, got int"),
        ('{"name": "n", "inner": {"rank": true}}', "f: inner.rank: expected int, got bool"),
        ('{"name": "n", "inner": {"rank": 0}}', "f: inner: rank: must be at least 1"),
        ('{"name": "n", "sizes": [1, "x"]}', "f: sizes[1]: expected float, got str"),
    ],
)
def test_what_does_not_fit_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_document(text, Outer, where="f")
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_key_that_is_given_twice_with_one_value_is_harmless() -> None:
    assert parse_document('{"name": "n", "name": "n"}', Outer, where="f").name == "n"


def test_a_closed_document_refuses_unknown_keys() -> None:
    with pytest.raises(UserError, match=r"key .more. is not known here; known are name, inner, sizes"):
        parse_document('{"name": "n", "more": 0}', Outer, where="f", closed=True)


@pytest.mark.parametrize(("value", "kind"), [({"a": 1}, dict[str, str]), ([1], dict[str, Any]), (None, int)])
def test_plain_types_are_checked_too(value: Any, kind: Any) -> None:
    with pytest.raises(UserError, match=r"^f: "):
        typed(value, kind, where="f")


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b'{"name": "\xe9"}')
    for path, said in [
        (tmp_path / "latin1", "not UTF-8 text"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "a\0b", "embedded null byte"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        with pytest.raises(UserError, match=said):
            read_document(path, Outer)
