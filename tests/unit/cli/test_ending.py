"""Launchers that die, and the note for torchrun's summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modellink_lora.cli.ending import record_error

WORKER = """
import os, time
from modellink_lora.cli.ending import watch_launcher
watch_launcher(poll_seconds=0.05)
print(os.getpid(), flush=True)
time.sleep(20)
"""
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}])"


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("launched", [True, False], ids=["by torchrun", "by hand"])
def test_a_process_ends_with_torchrun_and_outlives_a_shell(launched: bool, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    if launched:
        environment |= {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None and launcher.stderr is not None
    worker = int(launcher.stdout.readline())
    try:
        launcher.kill()
        launcher.wait()
        time.sleep(1)
        assert alive(worker) == (not launched)
    finally:
        if alive(worker):
            os.kill(worker, signal.SIGKILL)
    line = f"error: the launcher (torchrun, process {launcher.pid}) is gone: its processes end with it\n"
    assert launcher.stderr.read() == (line if launched else "")
    assert (tmp_path / "error.json").exists() == launched


def test_torchrun_reads_the_note_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    record_error("error: --lr is missing")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message["extraInfo"]["py_callstack"] == "error: --lr is missing"  # what its summary prints
    record_error("KeyError: 'x'", KeyError("x"))
    assert "KeyError: 'x'" in json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"]


TALKER = """
import sys
from modellink_lora.cli.ending import outlast_readers
outlast_readers()
for i in range(3000):
    print("a line that fills the pipe sooner or later", flush=True)
    print("an error too", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("saved")
"""


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TALKER, str(tmp_path / "file")]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert started.stdout and started.stdout.readline().startswith(b"a line")
    started.stdout.close()
    assert started.wait(30) == 0 and (tmp_path / "file").read_text() == "saved"
