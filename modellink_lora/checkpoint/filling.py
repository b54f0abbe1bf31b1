"""Filling output files from several threads, within a limit of memory, with a progress bar that counts bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

Tick = Callable[[int], object]  # told of bytes written


@dataclass(frozen=True)
class Job:
    """One tensor of the model on its way into the files."""

    run: Callable[[Tick], object]
    memory: int = 0  # bytes it holds at most


def ticking(blocks: Iterable[Tensor], tick: Tick, *, times: int = 1) -> Iterator[Tensor]:
    """`blocks`, with `tick` told of each when the next is asked for, that is when it has been written (`times`)."""
    for block in blocks:
        yield block
        tick(block.numel() * block.element_size() * times)


class Budget:
    """Lets jobs begin while their memory together stays within `limit`; one that alone needs more runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def fill(jobs: Sequence[Job], *, workers: int, total: int, memory: int, title: str) -> None:
    """Run all jobs, in order of their beginning; the first error stops the rest and is raised.

    Args:
        total: bytes that the jobs will write.
        memory: bytes that jobs at work may hold together.
    """
    budget, stop, lock = Budget(memory), threading.Event(), threading.Lock()
    threads = torch.get_num_threads()
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5) as bar:

        def tick(count: int) -> None:
            with lock:
                bar.update(count)

        def one(job: Job) -> None:
            if stop.is_set():
                return
            with budget.of(job.memory):
                try:
                    job.run(tick)
                except BaseException:
                    stop.set()
                    raise

        if workers == 1:
            for job in jobs:
                one(job)
            return
        try:
            # each worker computes on one core; the setting is a thread's own, but new threads begin with the last one
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                pending = [pool.submit(one, job) for job in jobs]
                try:
                    wait(pending)
                except BaseException:
                    stop.set()
                    raise
            for future in pending:
                future.result()  # of several errors that of the first job
        finally:
            torch.set_num_threads(threads)
