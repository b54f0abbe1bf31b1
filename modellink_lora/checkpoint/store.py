"""Folders of numbered checkpoints: the tracker file, `iter_NNNNNNN/`, one writer, and writing that is never half done.

What a name shows is complete, at whatever moment a process or a machine dies: new things are written beside the old
ones as `.NAME.PID.tmp`, brought to the disk, and renamed. Only a folder that replaces another of the same name has a
moment without either; the old one, then `.NAME.PID.old`, comes back with the next writer.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from modellink_lora.config.document import read_text
from modellink_lora.config.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
LOCK, CLAIM = ".lock", ".writer"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


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
    text = read_text(tracker).strip()
    if text == "release":
        return text
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{tracker} says {text[:40]!r}, expected an iteration number or 'release'")
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
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds; the old one is kept until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            _to_disk(inner)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def adding_files(root: Path, last: str, *, instead_of: str) -> Iterator[Path]:
    """A temporary folder whose files move into `root` when the block succeeds, `last` after all others.

    Readers need `last`: it goes away before the files matching `instead_of`, which the new ones replace, and comes
    back when those are on the disk. Other files in `root` stay.
    """
    temporary = _beside(root / last, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inner in temporary.iterdir():
            _to_disk(inner)
        (root / last).unlink(missing_ok=True)
        for old in root.glob(instead_of):
            old.unlink()
        for new in temporary.iterdir():
            if new.name != last:
                os.replace(new, root / new.name)
        _to_disk(root)
        os.replace(temporary / last, root / last)
        _to_disk(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders, and keep their names safe themselves
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(root: Path, *, flag: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Be the only writer of `root` inside the block, with the leftovers of a killed writer mended.

    The lock is the operating system's and dies with its process.

    Raises:
        UserError: another process holds it, on this host or, over a shared file system, on another.
    """
    new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        held, descriptor = _acquire(root, flag, tell)
    except OSError as error:
        raise UserError(f"{flag} {root} cannot be written: {error.strerror or error}") from None
    try:
        _mend(root)
        yield
    finally:
        held.unlink(missing_ok=True)  # before the lock is given back: later the file may be another writer's
        os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):  # something was written
                root.rmdir()


def writer_of(root: Path) -> str | None:
    """Who holds `root` now, in words; None if nobody does. Not for a process that holds it: closing drops the lock."""
    claim = root / CLAIM
    if claim.is_file():
        return _holder(claim.read_bytes())
    try:
        descriptor = os.open(root / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _holder(os.read(descriptor, 300)) if error.errno in (errno.EACCES, errno.EAGAIN) else None
    finally:
        os.close(descriptor)
    return None


def _acquire(root: Path, flag: str, tell: Callable[[str], None]) -> tuple[Path, int]:
    """The file that is held, and its descriptor.

    Locks of lockf's kind are not inherited by forked helpers, which could outlive this process and keep them.
    """
    path = root / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # an ending writer may have removed the file between our two calls: then this lock guards nothing
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _signature())
                return path, descriptor
        except OSError as error:
            holder = os.read(descriptor, 300)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{_taken(root, flag, holder)}: stop it, or choose another folder") from None
            if error.errno not in _NO_LOCKS:
                raise
            tell(f"warning: {root} is on a file system without locks; {CLAIM} in it marks the writer instead")
            path.unlink(missing_ok=True)
            return _claim(root, flag)
        os.close(descriptor)


def _claim(root: Path, flag: str) -> tuple[Path, int]:
    """Instead of a lock: a file that only one process can create. A killed writer's is taken over on its own host."""
    path = root / CLAIM
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            holder = path.read_bytes()
            host, pid = (holder.decode().split() + ["", ""])[:2]
            if host == os.uname().nodename and pid.isdigit() and not Path(f"/proc/{pid}").exists():
                path.unlink(missing_ok=True)
                continue
            raise UserError(f"{_taken(root, flag, holder)}: stop it; if it has ended, remove {path}") from None
        os.write(descriptor, _signature())
        return path, descriptor


def _signature() -> bytes:
    """Who holds a lock: host, process, since when."""
    return f"{os.uname().nodename} {os.getpid()} {datetime.datetime.now():%Y-%m-%dT%H:%M:%S}\n".encode()


def _taken(root: Path, flag: str, holder: bytes) -> str:
    return f"{flag} {root} is being written by another job: {_holder(holder)}"


def _holder(signature: bytes) -> str:
    host, pid, since = (signature.decode().split() + ["?"] * 3)[:3]
    return f"process {pid} on host {host}, since {since}"


def _mend(root: Path) -> None:
    """Put back, or remove, what a killed writer left. Only for the holder of the lock."""
    leftovers = [(path, match) for path in root.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    for path, match in sorted(leftovers, key=lambda leftover: leftover[0].stat().st_mtime, reverse=True):
        if match["kind"] == "old" and not (root / match["name"]).exists():
            os.replace(path, root / match["name"])  # killed between two renames: the only complete one
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
