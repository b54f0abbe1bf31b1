"""What the store asks of the operating system: exchanging names, second places for files, whether a process lives."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_AT_CWD, _EXCHANGE = -100, 2  # constants of renameat2(2)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, as Linux can on most file systems; False where it was not done."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0


def link(paths: Iterable[Path], folder: Path) -> None:
    """Give files and folders a second place in `folder`; copies where the file system has no links."""

    def place(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            shutil.copy2(source, target, follow_symlinks=False)

    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True, copy_function=place)
        else:
            place(str(path), str(folder / path.name))


def remove(path: Path) -> None:
    """Remove a file or folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def lives(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True
