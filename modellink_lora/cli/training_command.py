"""Reading the command that starts a training run, or the script that prints it, without starting it."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modellink_lora.config.errors import UserError

if TYPE_CHECKING:
    from modellink_lora.diagnosis.fit import Run

_PROGRAMS = ("posttrain_gpt.py", "pretrain_gpt.py")
_SECONDS = 60
_VARIABLE = re.compile(r"(--[a-z][\w-]*)[=\s]+\"?\$\{?([A-Za-z_]\w*)")


def command_of(script: Path) -> list[str]:
    """The words that `script` would start. Raises UserError when it cannot say."""
    if not script.is_file():
        raise UserError(f"--script {script}: no such file")
    text = script.read_text(encoding="utf-8", errors="replace")
    if "dry-run" not in text and "launch.sh" not in text:  # it would train
        raise UserError(f"--script {script}: takes no --dry-run; give its command instead: doctor -- torchrun ...")
    try:
        done = subprocess.run(
            ["bash", str(script), "--dry-run"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"--script {script} --dry-run: not done after {_SECONDS} s") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["it printed no command"])[-1]
        raise UserError(f"--script {script} --dry-run: status {done.returncode}: {said}")
    return shlex.split(lines[-1])


def variables_of(script: Path) -> dict[str, str]:
    """The variable that a script shows to a flag, by flag."""
    return dict(_VARIABLE.findall(script.read_text(encoding="utf-8", errors="replace")))


def read_command(words: Sequence[str], *, devices: int, variables: dict[str, str] | None = None) -> Run:
    """The run that a command starts.

    Args:
        devices: of this host, for a launcher that is told to take them all.
    Raises:
        UserError: it is not a training command, or a flag of it is wrong.
    """
    from modellink_lora.cli.train import training_parser
    from modellink_lora.diagnosis.fit import Run

    program, start = _program(words)
    launcher = words[:start]
    hosts, per_host = _processes(launcher, devices)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            given = training_parser(program).parse(words[start:])
    except SystemExit:
        raise UserError(errors.getvalue().strip() or f"{program} takes no such flags") from None
    return Run(world_size=hosts * per_host, per_host=per_host, given=given, variables=variables or {})


def _program(words: Sequence[str]) -> tuple[str, int]:
    """The program's name, and where its flags begin."""
    for index, word in enumerate(words):
        name = Path(word).name
        if name in _PROGRAMS:
            return name, index + 1
        if name in ("modellink-lora", "modellink_lora") and words[index + 1 : index + 2] == ["train"]:
            return "modellink-lora train", index + 2
    raise UserError(f"not a training command: {shlex.join(words[:6])} ... starts no {' or '.join(_PROGRAMS)}")


def _processes(launcher: Sequence[str], devices: int) -> tuple[int, int]:
    """(hosts, processes of each) as torchrun's or srun's flags say."""
    hosts = _value(launcher, "--nnodes", "--nodes", "-N") or "1"
    per_host = _value(launcher, "--nproc-per-node", "--nproc_per_node", "--ntasks-per-node")
    tasks = _value(launcher, "--ntasks", "-n")
    most = hosts.rpartition(":")[2]  # of an elastic MIN:MAX
    if not most.isdigit():
        raise UserError(f"--nnodes {hosts}: not a number of hosts")
    if per_host is None:
        return int(most), max(1, int(tasks) // int(most)) if tasks and tasks.isdigit() else 1
    return int(most), int(per_host) if per_host.isdigit() else devices


def _value(words: Sequence[str], *names: str) -> str | None:
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(words[index + 1 : index + 2]), None)
    return None
