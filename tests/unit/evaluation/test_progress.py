"""What is kept on disk: continuing, refusing other settings, torn lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.evaluation.progress import Progress, digest, fingerprint

SETTINGS = {"task": "mmlu", "num_shots": 5, "load": "base"}


def record(number: int) -> dict[str, object]:
    return {"subject": "s", "number": number, "models": {"base": {"prediction": "丙", "correct": True}}}


def begun(folder: Path, *numbers: int, **arguments: object) -> Progress:
    progress = Progress(folder, SETTINGS, **arguments)  # type: ignore[arg-type]
    progress.add([record(number) for number in numbers])
    progress.close()
    return progress


def test_finished_items_of_every_replica_are_found_again(tmp_path: Path) -> None:
    begun(tmp_path, 0, 2)
    begun(tmp_path, 1, 3, replica=1, replicas=2)
    assert sorted(Progress(tmp_path, SETTINGS).done) == [("s", 0), ("s", 1), ("s", 2), ("s", 3)]


def test_a_line_torn_by_a_kill_is_dropped_and_what_follows_is_whole(tmp_path: Path) -> None:
    begun(tmp_path, 0)
    file = tmp_path / "items.rank0.jsonl"
    file.write_text(file.read_text() + json.dumps(record(1))[:20])
    progress = begun(tmp_path, 2)
    assert sorted(progress.done) == [("s", 0), ("s", 2)]
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == [0, 2]


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    begun(tmp_path, 0)
    file = tmp_path / "items.rank0.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(UserError, match=r"items.rank0.jsonl line 1: is damaged.*--overwrite"):
        Progress(tmp_path, SETTINGS)


def test_other_settings_are_refused_by_name_unless_overwritten(tmp_path: Path) -> None:
    begun(tmp_path, 0)
    begun(tmp_path, 1, replica=1, replicas=2)
    other = SETTINGS | {"num_shots": 0}
    with pytest.raises(UserError, match=r"other settings: num_shots \(5, now 0\); .*--overwrite"):
        Progress(tmp_path, other)
    assert Progress(tmp_path, other, overwrite=True).done == {}
    assert sorted(path.name for path in tmp_path.glob("items*")) == ["items.rank0.jsonl"]
    assert json.loads((tmp_path / "settings.json").read_text()) == other
    assert digest(other) != digest(SETTINGS)


def test_joined_items_are_one_file_and_count_as_done(tmp_path: Path) -> None:
    progress = begun(tmp_path, 1, 0)
    progress.join([record(0), record(1)])
    assert [path.name for path in tmp_path.glob("items*")] == ["items.jsonl"]
    assert len(Progress(tmp_path, SETTINGS).done) == 2


def test_a_checkpoint_written_anew_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "iter_1").mkdir()
    (tmp_path / "iter_1/adapter.safetensors").write_bytes(b"1")
    before = fingerprint(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("no weights")
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "iter_1/adapter.safetensors").write_bytes(b"12")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint(None) is None
