"""Room and locks of a host, looked at without leaving anything behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modellink_lora.checkpoint import store
from modellink_lora.diagnosis import host

HOLD = """
import sys
from pathlib import Path
from modellink_lora.checkpoint.store import writing
with writing(Path(sys.argv[1]), flag="--save", tell=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_job_writes_is_a_problem_until_it_ends(tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    assert [f.level for f in host.lock_findings(save)] == ["ok"]
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(save)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (held,) = host.lock_findings(save)
        assert held.level == "problem" and f"process {other.pid} on host" in held.found
        other.communicate("")
    assert [f.level for f in host.lock_findings(save)] == ["ok"]
    assert list(save.iterdir()) == []


def test_a_file_system_that_grants_a_lock_twice_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.fcntl, "lockf", lambda *_: None)  # so does one that takes locks without keeping them
    (finding,) = host.lock_findings(tmp_path / "new" / "save")
    assert finding.level == "warning" and "two processes at once" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_disk_is_that_of_the_folder_that_will_be_made_in(tmp_path: Path) -> None:
    (finding,) = [f for f in host.host_findings({"disk of --save": tmp_path / "a" / "b"}, several_hosts=False)
                  if f.what == "disk of --save"]  # fmt: skip
    assert finding.level in ("ok", "warning") and "not there yet" in finding.found


@pytest.mark.parametrize(("free", "level"), [(10 * 2**30, "ok"), (2**30, "warning"), (2**20, "problem")])
def test_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    usage = type("Usage", (), {"free": free, "total": 2**40})
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: usage)
    levels = {f.what: f.level for f in host.host_findings({"disk": tmp_path}, several_hosts=False)}
    assert levels["disk"] == level


def test_a_name_that_means_this_host_only_warns_among_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.socket, "gethostbyname", lambda name: "127.0.1.1")

    def level(several: bool) -> str:
        return next(f.level for f in host.host_findings({}, several_hosts=several) if f.what == "name")

    assert (level(True), level(False)) == ("warning", "ok")
