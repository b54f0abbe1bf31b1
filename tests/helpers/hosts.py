"""Hosts of one machine: each has its own network, name, /etc/hosts and processes; a bridge connects them.

A host is a process in namespaces of its own, the switch another one. They end when this process does, however it does,
and the kernel then removes their networks and kills what runs in them: nothing can be left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TOOLS = ("ip", "nsenter", "unshare")
# the first process of a host: `cat` ends at the end of its input, which is the end of the test
_BOOT = "hostname {name} && mount --bind {hosts} /etc/hosts && exec cat"


class Unavailable(Exception):
    """Hosts cannot be made here; why."""


@dataclass
class Host:
    """One of the hosts. `enter` goes before the words of a command that shall run on it."""

    name: str
    address: str
    hosts_file: Path
    boot: subprocess.Popen[bytes] = field(repr=False)
    pid: int = 0

    @property
    def enter(self) -> tuple[str, ...]:
        spaces = ("--net", "--uts", "--mount", "--pid")
        return ("nsenter", f"--target={self.pid}", *spaces, "env", f"--chdir={os.getcwd()}")

    def run(self, *words: str) -> str:
        return _run(*self.enter, *words)

    def crash(self) -> None:
        """Kill everything that runs here at once, as a kernel panic does."""
        os.kill(self.pid, signal.SIGKILL)
        self.boot.wait()

    def know(self, names: dict[str, str]) -> None:
        """Let /etc/hosts of this host say so, and nothing else."""
        self.hosts_file.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in names.items()))


@dataclass(frozen=True)
class SlowCable:
    """How long each bit takes from a host to the switch, and how many a second pass."""

    delay: float
    rate: float


@dataclass
class Network:
    """Hosts node0, node1, ... of one switch."""

    hosts: list[Host]
    _switch: int

    def cut(self, host: Host) -> None:
        """Pull the plug at the switch: packets vanish, the host goes on and its interface stays up."""
        _run("nsenter", f"--target={self._switch}", "--net", "ip", "link", "set", f"to-{host.name}", "nomaster")


@contextlib.contextmanager
def network(count: int, folder: Path, *, cable: SlowCable | None = None) -> Iterator[Network]:
    """`count` hosts that know each other's names. Raises Unavailable where they cannot be made."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent or os.geteuid() != 0:
        raise Unavailable(f"no {', '.join(absent)}" if absent else "network namespaces need root")
    with contextlib.ExitStack() as held:
        try:
            switch = held.enter_context(_booted("unshare", "--net", "cat"))
            inside = ("nsenter", f"--target={switch.pid}", "--net")
            _wait_for(lambda: os.readlink(f"/proc/{switch.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
            _run(*inside, "ip", "link", "add", "bridge", "type", "bridge")
            _run(*inside, "ip", "link", "set", "bridge", "up")
            made = Network([_host(number, folder, inside, held, cable) for number in range(count)], switch.pid)
        except (subprocess.CalledProcessError, OSError, TimeoutError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            raise Unavailable(f"no network namespaces: {said.decode().strip()}") from error
        for host in made.hosts:
            host.know({other.name: other.address for other in made.hosts})
        yield made


def _host(
    number: int, folder: Path, switch: Sequence[str], held: contextlib.ExitStack, cable: SlowCable | None
) -> Host:
    name, hosts = f"node{number}", folder / f"hosts.{number}"
    hosts.write_text("127.0.0.1 localhost\n")
    boot = held.enter_context(
        _booted(
            *("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-c", _BOOT.format(name=name, hosts=hosts)),
        )
    )
    host = Host(name, f"10.77.0.{number + 1}", hosts, boot)
    _wait_for(lambda: boot.poll() is not None or [p.name() for p in psutil.Process(boot.pid).children()] == ["cat"])
    if boot.poll() is not None:
        raise OSError(f"{name} did not start")
    host.pid = psutil.Process(boot.pid).children()[0].pid
    if cable:
        _slow_cable(switch, host, cable, held)
    else:
        pair = ("type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        _run(*switch, "ip", "link", "add", f"to-{name}", *pair)
    _run(*switch, "ip", "link", "set", f"to-{name}", "master", "bridge", "up")
    host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "link", "set", "lo", "up")
    host.run("ip", "link", "set", "eth0", "up")
    return host


def _slow_cable(switch: Sequence[str], host: Host, cable: SlowCable, held: contextlib.ExitStack) -> None:
    program = Path(__file__).with_name("slow_cable.py")
    words = (str(host.pid), f"to-{host.name}", str(cable.delay), str(cable.rate))
    process = subprocess.Popen([*switch, sys.executable, str(program), *words], stdout=subprocess.PIPE)
    held.callback(process.wait)
    held.callback(process.kill)
    assert process.stdout
    if process.stdout.readline() != b"ready\n":
        raise OSError("no virtual network cards: /dev/net/tun")


@contextlib.contextmanager
def _booted(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its input ends, and at its end has taken its children along."""
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else []:
                child.kill()
            process.kill()


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, timeout=30).stdout.decode()


def _wait_for(there: object, *, seconds: float = 10) -> None:
    assert callable(there)
    limit = time.monotonic() + seconds
    while not there():
        if time.monotonic() > limit:
            raise TimeoutError("a namespace did not start")
        time.sleep(0.01)
