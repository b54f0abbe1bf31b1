"""The same training job on one host or on several, each with its own launcher, as users start it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modellink_lora.checkpoint.store import TRACKER
from tests.helpers.hosts import Host
from tests.helpers.jobs import TORCHRUN, Job
from tests.helpers.tiny import tiny_model
from tests.helpers.training import hf_to_megatron, write_corpus

PROGRAM = "tests/helpers/training_program.py"  # with a quick heartbeat
PRODUCT = "posttrain_gpt.py"
PROCESSES = 4


@dataclass(frozen=True)
class Source:
    """A base and data."""

    base: Path
    data: str


def make_source(root: Path) -> Source:
    return Source(hf_to_megatron(tiny_model("llama", root / "hf"), root / "base"), write_corpus(root / "data"))


def flags(source: Source, save: Path, **changes: object) -> list[object]:
    """Of a job that saves every second step and begins where the tracker of `save` says."""
    words: dict[str, object] = {
        "load": source.base, "save": save, "data-path": source.data, "seq-length": 32, "train-iters": 6, "lr": 5e-3,
        "min-lr": 5e-3, "lr-decay-style": "constant", "split": "100,0,0", "eval-iters": 0, "global-batch-size": 4,
        "save-interval": 2, "log-interval": 1, "lora-r": 4, "lora-alpha": 8, "lora-target-modules": "linear_qkv",
        "device": "cpu", **changes,
    }  # fmt: skip
    if (save / TRACKER).is_file():
        words["lora-load"] = save
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def saved(save: Path) -> int:
    """The newest checkpoint's iteration, 0 if there is none."""
    return int((save / TRACKER).read_text()) if (save / TRACKER).is_file() else 0


class Fleet:
    """One launcher a host; `jobs` and `logs` by host."""

    def __init__(self, hosts: Sequence[Host], jobs: Sequence[Job]) -> None:
        self.hosts, self.jobs = hosts, jobs

    @property
    def text(self) -> str:
        return "\n".join(f"== {host.name}\n{job.text}" for host, job in zip(self.hosts, self.jobs, strict=True))

    def until(self, there: Callable[[], object], *, seconds: float = 240) -> None:
        self.jobs[0].until(there, seconds=seconds)

    def end(self, *, within: float = 240) -> list[int]:
        """Wait for all; the exit status of each launcher."""
        limit = time.monotonic() + within
        return [job.ends(within=max(0.1, limit - time.monotonic())) for job in self.jobs]

    def errors(self) -> list[list[str]]:
        """The product's own lines that say why, by host."""
        return [[line for line in job.text.splitlines() if _is_reason(line)] for job in self.jobs]


def _is_reason(line: str) -> bool:
    return line.startswith("error: ") or (line.startswith("rank ") and ": error: " in line)


@contextlib.contextmanager
def fleet(
    hosts: Sequence[Host],
    words: Sequence[object],
    folder: Path,
    *,
    kind: str = "classic",
    program: str = PROGRAM,
    environment: Sequence[str] = (),
) -> Iterator[Fleet]:
    """Start four processes on these hosts.

    Args:
        kind: classic, c10d, or addresses, which is c10d for hosts that do not know each other's names.
    """
    with contextlib.ExitStack() as held:
        jobs = []
        for number, host in enumerate(hosts):
            own = folder / f"{host.name}.{len(list(folder.glob(f'{host.name}.*')))}"
            own.mkdir()
            launcher = (*TORCHRUN[:2], "--nnodes", str(len(hosts)), "--nproc-per-node", str(PROCESSES // len(hosts)))
            if kind == "classic":
                launcher += ("--node-rank", str(number), "--master-addr", hosts[0].name, "--master-port", "29500")
            else:
                endpoint = hosts[0].address if kind == "addresses" else hosts[0].name
                launcher += ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint}:29500", "--rdzv-id", "1")
                if kind == "addresses" and number == 0:
                    launcher += ("--rdzv-conf", "is_host=1")
            first = (own,) if program == PROGRAM else ()
            given = [f"PET_LOCAL_ADDR={host.address}"] if kind == "addresses" else []
            inside = (*host.enter, *environment, *given)
            job = Job(program, *first, *words, log=own / "log", launcher=launcher, inside=inside)
            jobs.append(held.enter_context(job))
        yield Fleet(hosts, jobs)
