"""What a host has left: memory, shared memory, disk, and whether a save folder can be locked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil

from modellink_lora.checkpoint.store import LOCK, writer_of, writing
from modellink_lora.config.errors import UserError
from modellink_lora.device import facts
from modellink_lora.diagnosis.finding import Finding, Level

TOPIC = "host"
_GIB = 2**30
_MOSTLY = 0.9
_LITTLE_DISK, _NO_DISK = 5 * _GIB, _GIB // 10
_SHARED = Path("/dev/shm")
_LITTLE_SHARED = _GIB  # NCCL takes some 10 MB a GPU; a container's default of 64 MB is what fails
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


def host_findings(folders: dict[str, Path], *, several_hosts: bool) -> list[Finding]:
    """Memory, shared memory and disk of this host.

    Args:
        folders: by what they are for; those that do not exist yet are made later, in a folder above.
    """
    return [_memory(), *_shared(), *(_disk(what, folder) for what, folder in folders.items()), *_name(several_hosts)]


def memory_findings(kind: str, indices: Iterable[int]) -> list[Finding]:
    """Memory of devices; a CPU's is the host's, which has its own line."""
    result = []
    for index in indices if kind != "cpu" else ():
        free, total = facts.memory(kind, index)
        taken = free < _MOSTLY * total
        result.append(Finding(
            "device", f"memory of {kind} {index}", f"{amount(free)} free of {amount(total)}, {facts.name(kind, index)}",
            "warning" if taken else "ok",
            "other programs hold the rest: end them, or take another device" if taken else "",
        ))  # fmt: skip
    return result


def lock_findings(save: Path) -> list[Finding]:
    """Whether `save` is free, and whether its file system keeps a second writer out. Changes nothing in it."""
    what = f"lock of --save {save}"
    if held := writer_of(save):
        return [
            Finding(TOPIC, what, f"is being written by {held}", "problem", "stop that job, or choose another folder")
        ]
    above = _existing(save)
    told: list[str] = []
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".doctor-") as folder:
            root = Path(folder) / "save"
            with writing(root, flag="--save", tell=told.append):
                kept_out = _second_writer(root)
    except (OSError, UserError) as error:
        return [Finding(TOPIC, what, f"{above} cannot be written: {error}", "problem", "choose another folder")]
    if told:
        return [Finding(TOPIC, what, "the file system has no locks", "warning",
                        "a file .writer marks the writer; after a crash on another host remove it")]  # fmt: skip
    if not kept_out:
        return [Finding(TOPIC, what, "locks are granted to two processes at once", "warning",
                        "start no two jobs with the same --save; mount the file system with locks")]  # fmt: skip
    return [Finding(TOPIC, what, "free; its file system keeps a second writer out")]


def folders_of(save: Path | None) -> dict[str, Path]:
    """Folders that a run writes into."""
    found = {"disk of the working folder": Path.cwd(), "disk of temporary files": Path(tempfile.gettempdir())}
    return {"disk of --save": save, **found} if save else found


def address_of(interface: str | None) -> str:
    """Where gloo listens: at `interface`, else at the address of the host's name, else at itself only."""
    if interface:
        found = psutil.net_if_addrs().get(interface.split(",")[0], [])
        addresses = [one.address for one in found if one.family in (socket.AF_INET, socket.AF_INET6)]
        return addresses[0].split("%")[0] if addresses else "127.0.0.1"
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket() as door:  # gloo takes it only if this host has it
            door.bind((address, 0))
        return address
    except OSError:
        return "127.0.0.1"


def amount(size: float) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB else f"{size / 2**20:,.1f} MiB"


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    limit = _limit()
    text = f"{amount(memory.available)} free of {amount(memory.total)}"
    if limit is not None and limit < memory.total:
        text += f"; this container may take {amount(limit)}"
    short = min(memory.available, limit or memory.available) < 2 * _GIB
    return Finding(TOPIC, "memory", text, "warning" if short else "ok",
                   "a process takes 1 GiB before it loads anything: end other programs" if short else "")  # fmt: skip


def _limit() -> int | None:
    """Bytes that the container may take; None without a limit."""
    for file in _CGROUPS:
        path = Path(file)
        if path.is_file():
            text = path.read_text().strip()
            return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None


def _shared() -> list[Finding]:
    if not _SHARED.is_dir():
        return []
    usage = shutil.disk_usage(_SHARED)
    short = usage.free < _LITTLE_SHARED
    advice = "NCCL and data loaders need it: docker run --shm-size 8g, or --ipc host" if short else ""
    return [Finding(TOPIC, "shared memory", f"{amount(usage.free)} free of {amount(usage.total)} in {_SHARED}",
                    "warning" if short else "ok", advice)]  # fmt: skip


def _disk(what: str, folder: Path) -> Finding:
    above = _existing(folder)
    try:
        free = shutil.disk_usage(above).free
    except OSError as error:
        return Finding(TOPIC, what, f"{above}: {error.strerror}", "problem", "choose another folder")
    writable = os.access(above, os.W_OK)
    level: Level = "problem" if free < _NO_DISK or not writable else "warning" if free < _LITTLE_DISK else "ok"
    text = f"{amount(free)} free in {folder}" + ("" if folder == above else " (not there yet)")
    if not writable:
        return Finding(TOPIC, what, f"{text}, which this user cannot write", level, "choose another folder")
    return Finding(TOPIC, what, text, level, "" if level == "ok" else "free some, or choose another folder")


def _name(several_hosts: bool) -> list[Finding]:
    """The address that this host's name stands for: where gloo listens unless an interface is named."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return [Finding(TOPIC, "name", f"{name} has no address", "problem" if several_hosts else "warning",
                        f"add {name} to /etc/hosts with the address that other hosts reach")]  # fmt: skip
    away = several_hosts and address.startswith("127.")
    return [Finding(TOPIC, "name", f"{name}, {address}", "warning" if away else "ok",
                    "other hosts cannot reach that address: set GLOO_SOCKET_IFNAME to the interface that they reach"
                    if away else "")]  # fmt: skip


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _second_writer(root: Path) -> bool:
    """Whether another process is kept out of `root`, which this one holds. A process is never kept out by itself."""
    code = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+') as file:\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except OSError: sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root / LOCK)], capture_output=True, check=False)
    return done.returncode == 3
