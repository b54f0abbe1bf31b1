"""The one exception that is shown to a user as a single line instead of a traceback, and what else becomes one."""

from __future__ import annotations

import errno
import re


class UserError(ValueError):
    """Bad input. The message says what is wrong, where (file, key, flag, shapes) and what to do."""


_ADVICE = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this machine",
    errno.EROFS: "write elsewhere",
    errno.ENOMEM: "use a machine with more memory, or fewer processes on it",
    errno.EIO: "look at the disk",
    errno.EFBIG: "raise the limit (ulimit -f), or write to another file system",
}
_FULL = re.compile(
    r"os error (28|122)\b|PytorchStreamWriter failed writing|inline_container\.cc\S* \. unexpected pos"
)  # safetensors, torch.save
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)


def as_user_error(error: BaseException) -> UserError | None:
    """What an error of files, disk or memory means to the user; None for what is a fault of the program.

    Files are opened in many places, and each may be missing, unreadable, or on a full disk.
    """
    if isinstance(error, UserError):
        return error
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _ADVICE):
        where = f"{error.filename}: " if error.filename is not None else ""
        advice = f": {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
        return UserError(f"{where}{error.strerror or said}{advice}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(said)):
        return UserError(f"not enough memory{f' ({said})' if said else ''}: use smaller sizes, or more devices")
    if isinstance(error, RuntimeError) and said.startswith("Symlink loop"):  # pathlib's, before Python 3.13
        return UserError(said)
    if _FULL.search(said):
        return UserError(f"the disk is full or cannot be written ({said}): {_ADVICE[errno.ENOSPC]}")
    return None


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would obey or cannot show (escapes, lone surrogates) written out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
