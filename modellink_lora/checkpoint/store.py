"""Folders of numbered checkpoints: the tracker file, `iter_NNNNNNN/`, one writer, and writing that is never half done.

What a name shows is complete, at whatever moment a process or a machine dies: new things are written beside the old
ones as `.NAME.PID.tmp`, brought to the disk, and renamed. A folder that replaces another of the same name is exchanged
with it in one step where the system can do that. Where it cannot, there is a moment without either; the old one, then
`.NAME.PID.old`, is put back by the next writer, who also removes what else dead writers of that name left.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from modellink_lora.checkpoint.disk import exchange, link, lives, remove
from modellink_lora.config.document import read_text
from modellink_lora.config.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
LOCK, CLAIM = ".lock", ".writer"
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old|set)")
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
        kept = next((path.name for path in root.glob(f".{folder.name}.*.old")), None)
        hint = f"; {kept} there is what a killed writer moved away: rename it to {folder.name}" if kept else ""
        raise UserError(f"{root / TRACKER} names {folder.name}, which does not exist in {flag} {root}{hint}")
    return folder


def write_tracker(root: Path, iteration: int | str) -> None:
    """Point `root` at `iteration`; the last thing a save does."""
    with pointing_at(root, iteration):
        pass


@contextlib.contextmanager
def pointing_at(root: Path, iteration: int | str) -> Iterator[None]:
    """Point `root` at `iteration` when the block, which writes it, succeeds; a full disk is met before the block."""
    with replacing_file(root / TRACKER) as temporary:
        temporary.write_text(str(iteration))
        to_disk(temporary)
        yield


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed onto it when the block succeeds and removed when it fails.

    A device or a pipe (/dev/stdout, /dev/null) is written as it is: a file renamed onto it would take its place.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_dead(path)
    temporary = beside(path, "tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds; the old one is kept until then."""
    path = Path(os.path.realpath(path))  # of a link, what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_dead(path)
    temporary = beside(path, "tmp")
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            to_disk(inner)
        _take_place(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def replacing_set(root: Path, last: str, *, instead_of: Sequence[str]) -> Iterator[Path]:
    """A temporary folder whose files become files of `root` together when the block succeeds; others in `root` stay.

    Where an old set is there, `root` is exchanged as a whole with a folder of the new files and links to the others.
    A `root` that cannot be renamed gets the files one by one, `last` after all others and gone meanwhile; readers,
    who need `last`, never see a mixture. The old set is kept until then, and the next writer puts it back.

    Args:
        last: the file without which the set is not read.
        instead_of: patterns of the files that belong to a set, which the new ones replace.
    """
    root = Path(os.path.realpath(root))
    root.mkdir(parents=True, exist_ok=True)
    clear_dead(root)
    clear_dead(root / last)
    old = [path for path in root.iterdir() if any(path.match(pattern) for pattern in (last, *instead_of))]
    whole = bool(old) and _is_movable(root)
    temporary = beside(root if whole else root / last, "tmp")
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for inner in temporary.iterdir():
            to_disk(inner)
        if whole:
            new = {path.name for path in temporary.iterdir()}
            link([path for path in root.iterdir() if path not in old and path.name not in new], temporary)
            shutil.copystat(root, temporary)
            to_disk(temporary)
            _take_place(temporary, root)
        else:
            _move_in(temporary, root, last, old)
    finally:
        remove(temporary)


def _take_place(new: Path, path: Path) -> None:
    """Give the folder `new` the name `path`, where another folder may be."""
    if path.exists() and exchange(new, path):
        to_disk(path.parent)
        return  # `new` is the old one now
    old = beside(path, "old")
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        to_disk(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        remove(old)


def _is_movable(root: Path) -> bool:
    """Whether the folder can be exchanged with another: no mount point, and nothing that this process stands in."""
    here = Path(os.path.realpath(os.curdir))
    return not os.path.ismount(root) and os.access(root.parent, os.W_OK) and root not in (here, *here.parents)


def _move_in(new: Path, root: Path, last: str, old: Sequence[Path]) -> None:
    """Move the files of `new` into `root` in place of `old`, `last` after all others."""
    kept = beside(root / last, "set")
    remove(kept)
    kept.mkdir()
    try:
        link(old, kept)
        to_disk(kept)
        (root / last).unlink(missing_ok=True)
        for path in old:
            if path.name != last:
                remove(path)
        for path in sorted(new.iterdir(), key=lambda path: path.name == last):
            os.replace(path, root / path.name)
        to_disk(root)
    finally:
        _put_back(kept, root, last)


def _put_back(kept: Path, root: Path, last: str) -> None:
    """Undo a replacement of a set that did not come to its end, and remove what was kept for that."""
    if not (root / last).exists():
        for path in sorted(kept.iterdir(), key=lambda path: path.name == last):
            remove(root / path.name)
            os.replace(path, root / path.name)
    remove(kept)


def beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def to_disk(path: Path) -> None:
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
    """Put back, or remove, what killed writers left in `root`. Only for the holder of the lock."""
    _settle([(path, match) for path in root.iterdir() if (match := LEFTOVER.fullmatch(path.name))])


def clear_dead(path: Path) -> None:
    """Put back, or remove, what writers of `path` left beside it whose processes have ended."""
    left_there = path.parent.glob(f".{glob.escape(path.name)}.*")
    found = [(left, match) for left in left_there if (match := LEFTOVER.fullmatch(left.name))]
    _settle([(left, match) for left, match in found if match["name"] == path.name and not lives(int(match["pid"]))])


def _settle(leftovers: list[tuple[Path, re.Match[str]]]) -> None:
    for path, match in sorted(leftovers, key=lambda leftover: leftover[0].lstat().st_mtime, reverse=True):
        name = path.with_name(match["name"])
        if match["kind"] == "old" and not name.exists():
            os.replace(path, name)  # killed between two renames: the only complete one
        elif match["kind"] == "set":
            _put_back(path, path.parent, match["name"])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
