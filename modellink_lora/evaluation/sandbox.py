"""Running code that a model wrote in a process of its own: limits and a deadline, against accidents and not attacks.

The program sees an empty folder, an empty environment and a closed standard input, and may use little time, memory and
disk. It runs as this user, and nothing cuts it off from the network or from files this user can read: whoever allows it
does so on a machine where that does no harm.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10.0
MEMORY_BYTES = 2 * 1024**3
FILE_BYTES = 4 * 1024**2

# The limits are set by the new process itself, before it reads the program: code between fork and exec of a parent with
# threads may deadlock. Limits cannot be raised again; RLIMIT_NPROC does not hold for root.
_LAUNCHER = """
import resource, sys
for name, value in (("CPU", {cpu}), ("AS", {memory}), ("FSIZE", {file}), ("CORE", 0), ("NOFILE", 32), ("NPROC", 0)):
    hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
with open(sys.argv[1], encoding="utf-8") as file:
    program = compile(file.read(), "program.py", "exec")
exec(program, {{"__name__": "program"}})
sys.stdout.write(sys.argv[2])
"""


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether `program` runs to its end without an exception within the limits."""
    launcher = _LAUNCHER.format(cpu=int(seconds) + 1, memory=MEMORY_BYTES, file=FILE_BYTES)
    reached = secrets.token_hex(16)  # an exit before the last line is a success for the operating system only
    with tempfile.TemporaryDirectory(prefix="modellink-lora-", ignore_cleanup_errors=True) as folder:
        source, output, work = Path(folder) / "program.py", Path(folder) / "output", Path(folder) / "work"
        source.write_text(program, encoding="utf-8", errors="surrogatepass")
        work.mkdir()
        with output.open("wb") as sink:
            process = subprocess.Popen(
                # isolated: neither the environment, nor this user's packages, nor the current folder is looked at
                [sys.executable, "-I", "-c", launcher, str(source), reached],
                cwd=work, env={}, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            ended = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = None
        finally:  # also when this program is interrupted meanwhile, and for what the process left running
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return ended == 0 and output.read_bytes().endswith(reached.encode())
