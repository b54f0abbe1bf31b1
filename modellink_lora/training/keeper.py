"""Which checkpoints of a run are written and which are kept: in the background if asked, never half, the best apart."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from modellink_lora.checkpoint.store import iteration_folder, replacing_file, replacing_folder, write_tracker
from modellink_lora.config.document import read_text
from modellink_lora.config.errors import UserError
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.training.state import Snapshot

BEST_TRACKER = "best_checkpointed_iteration.txt"


class Keeper:
    """Writes the checkpoints of a run below `root`. Rank 0 does the work; every process calls every method.

    Args:
        limit: how many of the newest checkpoints stay; 0 keeps all. The best one stays in any case.
        in_background: return as soon as the state is copied, and write while training goes on.
        say: for lines to the user.
    """

    def __init__(
        self, root: Path, context: ParallelContext, *, limit: int, in_background: bool, say: Callable[[str], None]
    ) -> None:
        self._root, self._context, self._limit, self._say = root, context, limit, say
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._best: int | None = _read_best(root)

    def save(self, iteration: int, snapshot: Snapshot | None, *, is_best: bool) -> None:
        """Write a checkpoint.

        Args:
            snapshot: on rank 0.
        Raises:
            UserError: on every process, when this save or an earlier one in the background failed.
        """
        self.finish()
        if snapshot is not None:
            self._say(f"saving checkpoint at iteration {iteration} to {self._root}")
            self._thread = threading.Thread(target=self._write, args=(iteration, snapshot, is_best), name="save")
            self._thread.start()
        if not self._in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background, and learn of its failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure: list[str | None] = [f"{type(self._error).__name__}: {self._error}" if self._error else None]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise UserError(
                f"--save {self._root}: saving failed ({failure[0]}); the newest whole checkpoint is the one that "
                "latest_checkpointed_iteration.txt names. Mend the cause and resume with --lora-load"
            )

    def _write(self, iteration: int, snapshot: Snapshot, is_best: bool) -> None:
        try:
            with replacing_folder(iteration_folder(self._root, iteration)) as folder:
                snapshot.write(folder)
            if is_best:
                self._best = iteration
                with replacing_file(self._root / BEST_TRACKER) as temporary:
                    temporary.write_text(str(iteration))
            write_tracker(self._root, iteration)
            self._say(f"successfully saved checkpoint at iteration {iteration} to {self._root}")
            self._drop_old(iteration)
        except Exception as error:  # whatever it is, it must reach the other processes
            self._error = error

    def _drop_old(self, newest: int) -> None:
        if not self._limit:
            return
        found = sorted(int(path.name[5:]) for path in self._root.glob("iter_*") if path.name[5:].isdigit())
        stay = {*[i for i in found if i <= newest][-self._limit :], self._best}
        for iteration in found:
            if iteration < newest and iteration not in stay:
                folder = iteration_folder(self._root, iteration)
                doomed = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
                os.replace(folder, doomed)  # a folder that is half removed must not look like a checkpoint
                shutil.rmtree(doomed, ignore_errors=True)


def _read_best(root: Path) -> int | None:
    file = root / BEST_TRACKER
    if not file.is_file():
        return None
    text = read_text(file).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{file} says {text!r}, expected an iteration number: correct it, or remove the file")
    return int(text)
