"""What the operating system refuses ends a command in one line; an error of the program keeps its traceback.

Seen in public as tinghuiz/SfMLearner#82 (a read-only file system) and Mikubill/naifu#35 (a folder that cannot be made,
after 13 hours of training): tracebacks.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modellink_lora.cli.main import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def _below_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "file" / "below").write_text("")


def _loop(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "loop").read_text()


def _full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _many_files(folder: Path) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(folder / "x"))


def _no_memory(folder: Path) -> None:
    torch.empty(1 << 60)


def _full_while_saving(folder: Path) -> None:
    """Libraries that write in other languages have errors of their own for a full disk."""
    torch.save({"w": torch.zeros(1 << 16)}, "/dev/full")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (_below_a_file, "below: Not a directory"),
        (_loop, "loop: Too many levels of symbolic links"),
        (lambda folder: (folder / ("x" * 300)).write_text(""), "File name too long"),
        (lambda folder: folder.read_text(), "Is a directory"),
        (lambda folder: (folder / "a\nb\udcff").read_text(), "a b\\udcff: No such file"),
        (_full, "No space left on device: free some space"),
        (_many_files, "ulimit -n"),
        (_no_memory, "not enough memory"),
        (_full_while_saving, "the disk is full"),
    ],
)
def test_refusals_are_one_line(
    job: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: job(tmp_path) and None) == 1  # type: ignore[func-returns-value]
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


TRAIN = pytest.param(["posttrain_gpt.py", "--help"], marks=pytest.mark.slow)  # imports torch


@pytest.mark.parametrize("words", [["-m", "modellink_lora"], TRAIN, ["convert_ckpt.py", "--help"]])
@pytest.mark.parametrize("end", ["| head -n 1", ">&-", "> /dev/full", "| true"])
def test_an_output_that_nobody_takes_is_no_traceback(words: list[str], end: str) -> None:
    command = f"{shlex.join([sys.executable, *words])} {end}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_an_error_of_the_program_is_not_hidden() -> None:
    def job() -> None:
        raise OSError("without a file")

    with pytest.raises(OSError, match="without a file"):
        run(job)
