"""Real processes for distributed tests: started once per world size, over gloo, and fed many checks.

`run(function, world_size=4, **arguments)` calls a module-level function in every process and returns the results by
rank. Starting a process costs seconds of imports; a check in a running one costs milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_SECONDS = 300
# Models under data or pipeline parallelism are not let go (a cycle through autograd's nodes), nor are their groups, of
# which each has three threads that poll; enough of them slow the whole machine down, and new processes cost seconds.
MOST_THREADS = 150
DOUBLE = str(Path(__file__).parent / "te_double")  # a stand-in for Transformer Engine, see its README
_pools: dict[tuple[int, bool], Pool] = {}


class Pool:
    """`size` processes that form one gloo process group.

    Args:
        double: they find a double of Transformer Engine, which other processes here do not.
    """

    def __init__(self, size: int, *, double: bool = False) -> None:
        self._key = (size, double)
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self._folder.name) / "rendezvous"
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited: must be there before torch is imported
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(rendezvous), theirs), daemon=True)
            with _on_path(DOUBLE if double else None):  # which a process inherits
                process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        for connection in self._connections:
            connection.send((function, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        pending = dict(zip(self._connections, range(len(self._connections)), strict=True))
        while pending:
            ready = wait(list(pending), timeout=TIMEOUT_SECONDS)
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[index]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"rank {rank} died without a word")
            failures = [text for good, text in answers.values() if not good]
            if failures or not ready:  # the others may wait for ever in a collective
                self.close()
                raise AssertionError("\n".join(failures) or f"no answer from ranks {sorted(pending.values())}")
        if psutil.Process(self._processes[0].pid).num_threads() > MOST_THREADS:
            self.close()
        return [answers[rank][1] for rank in range(len(answers))]

    def close(self) -> None:
        _pools.pop(self._key, None)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # megatron-core's writer of checkpoints starts a server
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
        self._folder.cleanup()


def run(function: Callable[..., Any], *, world_size: int, double: bool = False, **arguments: Any) -> list[Any]:
    """Call `function(**arguments)` on every rank; an exception on any rank fails here with its traceback."""
    key = (world_size, double)
    if key not in _pools:  # those of other sizes stay: idle they hold 0.3 GB a process, and no group
        _pools[key] = Pool(world_size, double=double)
    return _pools[key].run(function, arguments)


@contextlib.contextmanager
def _on_path(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@atexit.register
def close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()


def _serve(rank: int, size: int, rendezvous: str, connection: Connection) -> None:
    import logging
    import warnings

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from modellink_lora.device import get_device
    from modellink_lora.parallel.context import start_processes

    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    torch.set_num_threads(1)
    device = get_device("cpu")
    device.activate(0)
    for check in itertools.count():
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            # a group of its own for each check: megatron-core never closes the dozens of groups that it opens, and the
            # threads of gloo's wake up a hundred times a second even when nobody uses them
            start_processes(
                "gloo", rank=rank, world_size=size, init_method=f"file://{rendezvous}{check}", timeout_minutes=2
            )
            result = function(**arguments)
            parallel_state.destroy_model_parallel()
            # what megatron-core keeps beyond that: two groups, and in a cache every rotary embedding with its group
            parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
            parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = None
            RotaryEmbedding.forward.cache_clear()
            dist.destroy_process_group()
            gc.collect()  # models hold their groups in cycles
            connection.send((True, result))
        except BaseException:
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
