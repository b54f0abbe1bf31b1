"""`run.json`: what a run was, from which with metrics.jsonl its report can be made again at any time."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink_lora import __version__
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import read_document, to_json
from modellink_lora.config.errors import UserError

RECORD = "run.json"
FORMAT = 1
RUNNING = "running"  # also what stands there when a run was killed
LIBRARIES = ("torch", "torch-npu", "megatron-core", "transformers", "safetensors", "numpy")


def run_facts(
    *,
    configs: Sequence[Any],
    summary: Sequence[tuple[str, str]],
    adapters: tuple[Sequence[str], Sequence[Sequence[str]]],
    fusion: tuple[Sequence[str], Sequence[Sequence[str]]],
    notes: Sequence[str],
    memory: Mapping[str, int],
    device: Any,
    context: Any,
) -> dict[str, Any]:
    """What is known before the first step, as JSON values. All processes call it together.

    Args:
        configs: config dataclasses of the run, whose fields are shown with their flags.
        summary: (what, text) rows, as printed at the start.
        adapters: header and rows of the table of trainable parameters.
        fusion: header and rows of the levels at which fused linears run; no rows without --lora-fusion.
        memory: estimated bytes on this rank by what they hold.
    """
    import psutil
    import torch.distributed as dist

    processes: list[Any] = [None] * context.world_size
    place = {"tp": context.tp_rank, "pp": context.pp_rank, "dp": context.dp_rank}
    dist.all_gather_object(processes, {"host": socket.gethostname(), **place, "launcher": launcher()})
    return {
        "command": shlex.join(psutil.Process().cmdline()),
        "folder": str(Path.cwd()),
        "processes": processes,
        "layout": {"tp": context.tp_size, "pp": context.pp_size, "dp": context.dp_size},
        "device": {"name": device.name, "describe": device.describe()},
        "versions": versions(),
        "summary": [list(row) for row in summary],
        "adapters": {"header": list(adapters[0]), "rows": [list(row) for row in adapters[1]]},
        "fusion": {"header": list(fusion[0]), "rows": [list(row) for row in fusion[1]]},
        "flags": [flags_of(config) for config in configs],
        "memory": dict(memory),
        "notes": list(notes),
    }


def launcher() -> str:
    """Which process has started this one; no other has the same answer."""
    import psutil

    parent = psutil.Process().parent()
    return f"{socket.gethostname()} {parent.pid} {parent.create_time():.2f}" if parent else ""


def last_launchers(folder: Path) -> set[str]:
    """What `launcher` was in the processes of the last session that wrote to `folder`; nothing where nobody knows."""
    if not (folder / RECORD).is_file():
        return set()
    processes = read_record(folder)["sessions"][-1].get("processes") or []
    return {process["launcher"] for process in processes if process.get("launcher")}


def flags_of(config: Any) -> dict[str, Any]:
    """Title of a config class, and (flag, value, default) of each field that is a flag."""
    rows = []
    for field in dataclasses.fields(config):
        if not field.metadata.get("flag") or field.metadata.get("hidden"):
            continue
        value = getattr(config, field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        if field.metadata.get("inverted"):
            value, default = not value, not default
        flag = "--" + (field.metadata.get("name") or field.name.replace("_", "-"))
        rows.append([flag, _plain(value), _plain(default)])
    return {"title": (config.__doc__ or type(config).__name__).strip().splitlines()[0], "rows": rows}


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide results."""
    found = {"modellink_lora": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class RunRecord:
    """The record of one save folder, over every session (start to end of the program) that wrote to it.

    Args:
        start: iteration this session starts at; 0 forgets what earlier sessions left.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, start: int) -> None:
        self._path = folder / RECORD
        sessions = []
        if start and self._path.is_file():
            sessions = read_record(folder).get("sessions", [])
            for session in sessions:
                if session["status"] == RUNNING:
                    session["status"] = "ended without a word (killed?)"
        of_session = {key: facts.get(key) for key in ("command", "folder", "processes")}
        self._session = {"started": _now(), "first": start, "status": RUNNING, **of_session}
        others = {key: value for key, value in facts.items() if key not in of_session}
        self.values: dict[str, Any] = {"format": FORMAT, **others, "sessions": [*sessions, self._session]}
        self.write()

    def note(self, text: str) -> None:
        """Keep a note or warning that came up during the run."""
        self.values["notes"] = [*self.values.get("notes", []), text]

    def measured(self, iteration: int, ranks: Sequence[Mapping[str, float]]) -> None:
        """Keep the last time split and memory of every rank."""
        self.values["measured"] = {"iteration": iteration, "ranks": [dict(rank) for rank in ranks]}

    def end(self, status: str) -> None:
        self._session.update(status=status, ended=_now())
        self.write()

    def write(self) -> None:
        with replacing_file(self._path) as temporary:
            temporary.write_text(to_json(self.values, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record in `folder`. Raises UserError when there is none, or not one of ours."""
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{folder} holds no {RECORD}: give the --save folder of a training run")
    try:
        record: dict[str, Any] = read_document(path, dict[str, Any])
        newer = record["format"] > FORMAT
        assert newer or record["sessions"][-1]["status"]
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is not the record of a training run ({error!r})") from None
    if newer:
        raise UserError(f"{path} was written by a newer version (format {record['format']}): update modellink_lora")
    return record


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """JSON's idea of a flag's value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
