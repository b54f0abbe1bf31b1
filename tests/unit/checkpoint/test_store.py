"""Folders of checkpoints under every kill: what a tracker names is whole, and a folder has one writer."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modellink_lora.checkpoint import store
from modellink_lora.checkpoint.store import (
    CLAIM,
    LOCK,
    iteration_folder,
    newest,
    replacing_folder,
    write_tracker,
    writing,
)
from modellink_lora.config.errors import UserError

NAMES = ("adapter.safetensors", "part/optimizer.safetensors", "training.json")
TOUCHING = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def save(root: Path, iteration: int, content: str) -> None:
    with replacing_folder(iteration_folder(root, iteration)) as folder:
        for name in NAMES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
    write_tracker(root, iteration)


def content(root: Path) -> set[str]:
    folder = newest(root, flag="--save")
    return {(folder / name).read_text() for name in NAMES}


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, and return the wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(child, 0)[1]


def killed_at(count: int, work: Callable[[], None]) -> bool:
    """Do `work` in a process that is killed before it touches the disk for the `count`-th time; False: it was not."""

    def watched() -> None:
        seen = 0

        def hook(event: str, arguments: object) -> None:
            nonlocal seen
            if event in TOUCHING:
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    status = in_child(watched)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def tell_nothing(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize("iteration", [5, 6], ids=["the same iteration again", "the next iteration"])
def test_after_a_kill_at_any_moment_of_a_save_the_next_writer_finds_a_whole_checkpoint(
    tmp_path: Path, iteration: int
) -> None:
    found: list[str] = []
    for count in range(1, 1000):
        root = tmp_path / str(count)
        save(root, 5, "old")
        if not killed_at(count, lambda root=root: save(root, iteration, "new")):
            break
        with writing(root, flag="--save", tell=tell_nothing):
            found += content(root)
            assert len(content(root)) == 1, f"a mixture after a kill before touch {count}"
            left = [path.name for path in root.iterdir() if path.name.startswith(".")]
            assert left == [LOCK], left
    assert count > 15 and content(tmp_path / str(count)) == {"new"}
    assert set(found) == {"old", "new"} and found == sorted(found, reverse=True), "once new, it stays new"


def test_a_kill_of_the_mending_writer_is_mended_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    os.replace(tmp_path / "iter_0000005", tmp_path / ".iter_0000005.17.old")  # killed between two renames
    (tmp_path / ".iter_0000005.17.tmp").mkdir()
    (tmp_path / ".latest_checkpointed_iteration.txt.17.tmp").write_text("6")

    def mend() -> None:
        with writing(tmp_path, flag="--save", tell=tell_nothing):
            pass

    for count in range(1, 100):
        if not killed_at(count, mend):
            break
    assert content(tmp_path) == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "latest_checkpointed_iteration.txt"]


def test_a_failing_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, "old")
    replace = os.replace

    def once_full(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "no space left")
        replace(source, target)

    monkeypatch.setattr(store, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", once_full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 5, "new")
    assert content(tmp_path) == {"old"} and len(list(tmp_path.iterdir())) == 2


class Writer:
    """Another process that holds a folder until it is killed."""

    def __init__(self, root: Path, tell: Callable[[str], None] = tell_nothing) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with writing(root, flag="--save", tell=tell):
                    if os.fork() != 0:  # the other is a helper, which must not inherit the lock
                        os.write(writer, b"!")
                    os.close(writer)
                    signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 1) == b"!", "it could not begin"
        self._children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self) -> None:
        for child in self._children:
            os.kill(int(child), signal.SIGKILL)


def test_a_second_writer_is_refused_with_host_and_process_and_a_killed_one_is_followed(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    (tmp_path / ".iter_0000006.17.tmp").mkdir()
    first = Writer(tmp_path)
    (tmp_path / ".iter_0000007.17.tmp").mkdir()
    before = sorted(tmp_path.iterdir())
    try:
        expected = (
            f"--save {tmp_path} is being written by another job: process {first.pid} on host {os.uname().nodename}"
        )
        with (
            pytest.raises(UserError, match=expected),
            writing(tmp_path, flag="--save", tell=tell_nothing),
        ):
            raise AssertionError("two writers")
        assert sorted(tmp_path.iterdir()) == before
        first.kill()
        with writing(tmp_path, flag="--save", tell=tell_nothing):
            pass
    finally:
        first.end()


def test_where_there_are_no_locks_a_file_marks_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    told: list[str] = []
    first = Writer(tmp_path, told.append)
    try:
        with (
            pytest.raises(UserError, match=f"process {first.pid} .*: stop it; if it has ended, remove .*{CLAIM}"),
            writing(tmp_path, flag="--save", tell=told.append),
        ):
            raise AssertionError("two writers")
        first.kill()
        with writing(tmp_path, flag="--save", tell=told.append):
            assert (tmp_path / CLAIM).exists()
        assert list(tmp_path.iterdir()) == []
        assert set(told) == {
            f"warning: {tmp_path} is on a file system without locks; .writer in it marks the writer instead"
        }
        (tmp_path / CLAIM).write_text("elsewhere 17 2026-01-01T00:00:00")
        with pytest.raises(UserError, match="on host elsewhere"), writing(tmp_path, flag="--save", tell=told.append):
            raise AssertionError("a host that cannot be asked")
    finally:
        first.end()


def test_a_job_that_fails_before_it_writes_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad"), writing(tmp_path / "save", flag="--save", tell=tell_nothing):
        raise UserError("bad")
    assert not (tmp_path / "save").exists()


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=f"--save {tmp_path}/file/save cannot be written: Not a directory"),
        writing(tmp_path / "file/save", flag="--save", tell=tell_nothing),
    ):
        raise AssertionError


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with store.replacing_file(tmp_path / "pipe") as temporary:
        temporary.write_text("said")
    assert os.read(reader, 10) == b"said" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
