"""Several files of a folder that others write into as well, replaced together.

The step that counts is the appearance of one more file, the commit: a list of the renames that are left to do. A kill
before it leaves the old set, one after it the new set, since whoever opens the set does the renames first. A set has
one writer at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modellink_lora.checkpoint.store import LEFTOVER, beside, clear_dead, replacing_file, to_disk
from modellink_lora.config.document import read_document
from modellink_lora.config.errors import UserError


@contextlib.contextmanager
def replacing_files(commit: Path, paths: Sequence[Path]) -> Iterator[Mapping[Path, Path]]:
    """Temporary names of `paths`, whose files all take their places together when the block succeeds.

    What a dead writer of the same set left is put right first. When the block fails, the old files stay.

    Args:
        commit: the file that says which renames are to be done; in the folder of all `paths`.
    """
    try:
        commit.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{commit.parent}: is below a file, or one itself, and no folder can be there") from None
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: is a folder where a file is to be written: remove it, or choose another name")
    with _only_writer(commit.with_suffix(".lock")):
        finish_replacing(commit)
        for path in paths:
            clear_dead(path)
        yield from _replaced(commit, {path: beside(path, "tmp") for path in paths})


@contextlib.contextmanager
def _only_writer(lock: Path) -> Iterator[None]:
    """Hold `lock` inside the block. It is the operating system's and dies with its process."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise UserError(
                    f"{lock.with_name(lock.stem[1:])}: another process is writing these files now: wait for its end, "
                    "or choose another name"
                ) from None  # of other errors, the file system has no locks
        # an ending writer may have removed the file between the two calls: then this lock guards nothing
        if lock.exists() and os.path.samestat(os.stat(lock), os.fstat(descriptor)):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock is given back: later the file may be another writer's
        os.close(descriptor)


def _replaced(commit: Path, temporaries: Mapping[Path, Path]) -> Iterator[Mapping[Path, Path]]:
    try:
        yield temporaries
        for temporary in temporaries.values():
            to_disk(temporary)
        with replacing_file(commit) as writing:
            writing.write_text(json.dumps({temporary.name: path.name for path, temporary in temporaries.items()}))
        finish_replacing(commit)
    finally:
        if not commit.exists():
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)


def finish_replacing(commit: Path) -> None:
    """Do the renames that a killed writer left, if there are any. Several processes may do so at one time.

    Raises UserError where this folder cannot be written.
    """
    if not commit.is_file():
        return
    try:
        renames = read_document(commit, dict[str, str])
        for temporary, name in renames.items():
            match = LEFTOVER.fullmatch(temporary)
            if not match or match["name"] != name or "/" in temporary:
                raise UserError(f"{commit}: was not written by this program: remove it")
            with contextlib.suppress(FileNotFoundError):  # done already
                os.replace(commit.with_name(temporary), commit.with_name(name))
        to_disk(commit.parent)
        commit.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{commit}: a run of preprocess_data.py was killed while it renamed its files, and this folder cannot be "
            f"written to finish that ({error.strerror}): open the data once from where it can"
        ) from None
