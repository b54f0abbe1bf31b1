"""The launch scripts of examples/ as a user starts them, in a folder of his own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*/*.sh"))
NOT_INHERITED = ("RANK", "WORLD_SIZE", "SLURM", "MASTER_", "NNODES", "NODE_RANK", "RDZV", "GPUS_", "NPUS_", "LOG")


def environment(**variables: object) -> dict[str, str]:
    """This process's, without what another launch could have left there, with our Python first on the PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return {
        **kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()},
    }  # fmt: skip


def run_script(
    script: str, *words: object, cwd: Path, timeout: float = 300, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run examples/`script` in `cwd` with more words and variables; what it printed, both streams together."""
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *map(str, words)], cwd=cwd, env=environment(**variables), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
    )  # fmt: skip


def command_of(script: str, *words: object, cwd: Path, **variables: object) -> list[str]:
    """The words that the script would start."""
    done = run_script(script, *words, "--dry-run", cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines
    return shlex.split(lines[0])


def program_of(command: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the program in a command, and its flags."""
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    return Path(command[at]).name, list(command[at + 1 :])


def succeeds(script: str, *words: object, cwd: Path, **variables: object) -> str:
    """Run it; what it printed."""
    done = run_script(script, *words, cwd=cwd, **variables)
    assert done.returncode == 0, f"{script}\n{done.stdout[-6000:]}"
    return done.stdout
