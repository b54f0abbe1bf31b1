"""Folders of numbered checkpoints: the tracker file, `iter_NNNNNNN/`, and writing that is never half done."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from modellink_lora.config.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(root: Path, iteration: int | str) -> Path:
    """`iter_0000500` below `root`, or `release`."""
    return root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")


def read_tracker(root: Path, *, flag: str) -> int | str:
    """Iteration of the newest checkpoint below `root`, or "release". Raises UserError with `flag` if there is none."""
    if not root.is_dir():
        raise UserError(f"{flag} {root}: no such folder")
    tracker = root / TRACKER
    if not tracker.is_file():
        raise UserError(f"{flag} {root}: holds no checkpoint ({TRACKER} is missing)")
    text = tracker.read_text().strip()
    if text == "release":
        return text
    if not text.isdigit():
        raise UserError(f"{tracker} says {text!r}, expected an iteration number or 'release'")
    return int(text)


def newest(root: Path, *, flag: str) -> Path:
    """Folder of the newest checkpoint below `root`. Raises UserError when tracker and folders disagree."""
    folder = iteration_folder(root, read_tracker(root, flag=flag))
    if not folder.is_dir():
        raise UserError(f"{root / TRACKER} names {folder.name}, which does not exist in {flag} {root}")
    return folder


def write_tracker(root: Path, iteration: int | str) -> None:
    """Point `root` at `iteration`; the last thing a save does."""
    with replacing_file(root / TRACKER) as temporary:
        temporary.write_text(str(iteration))


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed onto it when the block succeeds and removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds; the old one is kept until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
