"""Token files that are not what was written, or not what the model can learn from, do not train.

Seen in public as allenai/OLMo-core#619: damaged token ids ended in a device-side assert of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.check import check_corpus
from modellink_lora.data.corpus import KEYS, InstructionCorpus, data_file, sidecar_file, writing_corpus

VOCAB = 300


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, where what was checked is remembered."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    generator = numpy.random.default_rng(0)
    with writing_corpus(str(tmp_path / "d/a"), {"format": 1}) as writer:
        for length in (9, 5, 30, 2, 17):
            ids = [int(x) for x in generator.integers(0, VOCAB, length)]
            writer.add(ids, [1] * length, [-100] * (length // 2) + ids[length // 2 :])
    return str(tmp_path / "d/a")


def check(prefix: str) -> str:
    return check_corpus(InstructionCorpus(prefix), VOCAB)


def change(prefix: str, key: str, edit: Callable[[Any], Any]) -> None:
    path = data_file(prefix, key, "bin")
    values = numpy.fromfile(path, "<i4")
    edit(values).astype("<i4").tofile(path)


def forget_checksums(prefix: str) -> None:
    """As files of older versions and of other programs are."""
    sidecar_file(prefix).unlink()


def test_whole_data_are_read_once(prefix: str, home: Path) -> None:
    assert check(prefix) == "checked: ids, labels and checksums of 63 tokens"
    assert check(prefix) == "checked before"
    data_file(prefix, "labels", "bin").touch()
    assert check(prefix).startswith("checked: ")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_one_bit_of_any_file_is_noticed(prefix: str, key: str, ending: str) -> None:
    path = data_file(prefix, key, ending)
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        data = bytearray(good)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        with pytest.raises(UserError):
            check(prefix)


def test_one_bit_of_the_record_is_noticed_or_changes_nothing(prefix: str) -> None:
    path = sidecar_file(prefix)
    good, text = json.loads(path.read_text()), path.read_bytes()
    for place in range(len(text)):
        data = bytearray(text)
        data[place] ^= 1 << (place % 7)
        path.write_bytes(data)
        try:
            found = InstructionCorpus(prefix).sidecar
        except UserError:
            continue
        # a damaged name of the key `crc32` leaves a record without checksums
        assert found == good or "crc32" not in (found or {}), place


RANDOM = numpy.random.default_rng(1).integers(0, VOCAB, 63)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("key", "edit", "said"),
    [
        ("labels", lambda x: RANDOM, "a label is -100 or the token at its own place"),
        ("labels", lambda x: numpy.where(x >= 0, 10**6, x), "a label is -100 or a token"),
        ("labels", lambda x: numpy.where(x >= 0, -5, x), "a label is -100 or a token"),
        ("input_ids", lambda x: numpy.where(x == x.max(), VOCAB, x), f"{VOCAB} among its input_ids, but the model has"),
        ("input_ids", lambda x: numpy.where(x == x.max(), -1, x), "-1 among its input_ids"),
    ],
)
def test_labels_are_their_own_tokens_and_ids_are_tokens(
    prefix: str, key: str, edit: Callable[[Any], Any], said: str, own: bool
) -> None:
    if not own:
        forget_checksums(prefix)
    change(prefix, key, edit)
    with pytest.raises(UserError, match=said):
        check(prefix)


def test_the_end_token_of_other_templates_may_stand_after_an_answer(tmp_path: Path) -> None:
    """ModelLink's templates with one end token a conversation label the place after an answer with it."""
    ids, end = [5, 6, 7, 8, 9, 10, 11, 12], 2
    with writing_corpus(str(tmp_path / "a"), {}) as writer:
        writer.add([*ids, end], [1] * 9, [-100, -100, 7, 8, end, -100, 11, 12, end])
    forget_checksums(str(tmp_path / "a"))
    assert check(str(tmp_path / "a")).startswith("checked: ids, labels of 9")


def test_data_without_a_record_are_checked_too(prefix: str) -> None:
    forget_checksums(prefix)
    assert check(prefix) == "checked: ids, labels of 63 tokens"
