"""Where scalars go besides metrics.jsonl: TensorBoard and Weights & Biases. Neither may stop or hold up a run."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from modellink_lora.config.errors import UserError

FINISH_SECONDS = 60.0
HURRIED_SECONDS = 10.0  # after an error or a signal, when somebody waits for the process to end


class Tracker(Protocol):
    def log(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, good: bool) -> str | None:
        """End, `good` or before the time; returns a line to tell the user, if there is something to tell."""
        ...


class TensorBoard:
    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self, *, good: bool) -> str | None:
        self._writer.close()
        return None


@dataclass(frozen=True)
class Wandb:
    """What Weights & Biases is told; made on every process, so that all of them refuse alike. `start` is for one.

    Raises:
        UserError: the package is not installed.
    """

    project: str
    name: str | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"--wandb-project {self.project}: the package wandb is not installed; "
                "pip install wandb, or leave the flag out (metrics.jsonl and --tensorboard-dir need no package)"
            )

    def start(self, facts: Mapping[str, Any], save: Path | None) -> _WandbRun:
        """Begin the run; name and folder default to those of `save`. WANDB_MODE=offline is left to wandb itself."""
        import wandb

        folder = Path(self.folder) if self.folder else save
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        name = self.name or (save.resolve().name if save else None)
        flags = {flag: value for group in facts.get("flags", []) for flag, value, _ in group["rows"]}
        try:
            run = wandb.init(
                project=self.project, name=name, dir=folder, config=flags,
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )  # fmt: skip
        except Exception as error:  # wandb has no common class for "not logged in", "no network" and the rest
            said = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"--wandb-project {self.project}: {said}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        return _WandbRun(run)


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run, self._failed = run, False

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        if self._failed:
            return
        try:
            self._run.log(dict(values), step=iteration)
        except Exception as error:
            self._failed = True
            logging.getLogger(__name__).warning("Weights & Biases stopped taking values: %s", error)

    def close(self, *, good: bool) -> str | None:
        """Finish in the background and wait for a while only: an upload must not keep a cluster busy."""
        run, folder = self._run, self._run.dir.removesuffix("/files")
        if within(FINISH_SECONDS if good else HURRIED_SECONDS, lambda: run.finish(exit_code=0 if good else 1)):
            where = f"kept in {folder}, send it with `wandb sync {folder}`" if run.offline else run.url
            return f"Weights & Biases: {where}"
        return f"warning: Weights & Biases is not done; send the rest with `wandb sync {folder}`"


def within(seconds: float, call: Callable[[], Any]) -> bool:
    """Whether `call` returned in time without an error; it goes on in a daemon thread otherwise."""
    done: list[bool] = []

    def work() -> None:
        try:
            call()
            done.append(True)
        except Exception as error:
            logging.getLogger(__name__).warning("Weights & Biases did not finish: %s", error)

    thread = threading.Thread(target=work, daemon=True, name="wandb-finish")
    thread.start()
    thread.join(seconds)
    return bool(done)
