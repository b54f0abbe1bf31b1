"""Joining the processes of a multi-process job: the device made active, the process group entered and left.

When one of several processes fails inside, all end, and one line a host says why.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist

from modellink_lora.checkpoint.store import writing
from modellink_lora.cli.ending import end
from modellink_lora.cli.launch import Launch, set_environment_defaults
from modellink_lora.cli.network import GLOO, set_network_defaults
from modellink_lora.cli.signals import Stop
from modellink_lora.config.errors import UserError, as_user_error, printable
from modellink_lora.device import Device, get_device
from modellink_lora.parallel.context import start_processes
from modellink_lora.parallel.liveness import Liveness, Timing
from modellink_lora.parallel.meeting import meet

# All processes usually fail for the same reason: the others give the first that long to say it without a rank's name.
_FIRST_SPEAKS_SECONDS = 3.0
_TOGETHER_SECONDS = 30.0  # what processes that were started at one time may come late
_ANSWER_SECONDS = 10.0  # what the store may take to say that its time is over


@contextlib.contextmanager
def joined(
    launch: Launch,
    *,
    device: str,
    timeout_minutes: int,
    deterministic: bool = False,
    overlapping: bool = False,
    stop: Stop | None = None,
    timing: Timing | None = None,
) -> Iterator[tuple[Device, torch.device]]:
    """The active device and this process's torch device, inside the default process group.

    Code that imports megatron-core must be imported inside the block, when the device is active.

    Args:
        device: a device's name, or "auto" for what the environment says.
        overlapping: see `set_environment_defaults`.
        stop: the wish to stop, which then also looks at the other processes.
        timing: of the heartbeat.
    """
    chosen = get_device(device if device != "auto" else launch.device)
    set_environment_defaults(chosen.name, deterministic=deterministic, overlapping=overlapping)
    # megatron-core warns about optional GPU libraries at every start; none of them is used here
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # megatron-core calls collectives by names that newer releases of torch are renaming
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    store = _met(launch, timeout_minutes)
    stop = stop or Stop()
    # From here on the heartbeat notices who is missing, also while libraries are loaded and a device is prepared.
    stop.peers = peers = _watched(launch, store, timing or Timing()) if store else None
    try:
        if launch.mindspeed:
            words, sys.argv = sys.argv, sys.argv[:1]  # it reads them, and takes every flag it does not know for its own
            try:
                chosen.adopt_mindspeed()
            finally:
                sys.argv = words
        torch_device = chosen.activate(launch.local_rank)
        _start(chosen.backend, launch, store, timeout_minutes)
        yield chosen, torch_device
        if peers:
            peers.leave()
    except BaseException as error:
        if peers:
            stop.failing = not isinstance(error, KeyboardInterrupt)
            _fail(error, launch, peers)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def one_writer(launch: Launch, save: Path | None) -> Iterator[None]:
    """The first process holds the lock of `save`; the others enter when it does. Inside `joined`."""
    with contextlib.ExitStack() as held:
        if save and launch.is_first:
            held.enter_context(writing(save, flag="--save", tell=lambda line: print(line, flush=True)))
        if save and launch.world_size > 1:  # nobody may read a folder that is being mended
            dist.barrier()
        yield


def _met(launch: Launch, timeout_minutes: int) -> dist.Store | None:
    """The store at which several processes have met; None for a single one."""
    if launch.world_size == 1:
        return None
    set_network_defaults(launch)
    patience = 60.0 * timeout_minutes
    if launch.has_store:  # torchrun starts all processes at one time, and has brought the libraries into memory before
        alive = time.time() - psutil.Process().create_time()
        patience = min(patience, _TOGETHER_SECONDS + 3 * alive)
    # torch waits without a limit for the answer of a program that listens there and is no store
    deaf = UserError(
        f"what listens at MASTER_ADDR={launch.master_address} MASTER_PORT={launch.master_port} does not answer as the "
        "store of a job: another program has that port; set MASTER_PORT to a free one, the same for all processes"
    )
    limit = threading.Timer(patience + _ANSWER_SECONDS, end, (f"error: {deaf}", 1), {"speak": launch.local_rank == 0})
    limit.daemon = True
    limit.start()
    try:
        return meet(
            address=launch.master_address, port=launch.master_port, rank=launch.rank, world_size=launch.world_size,
            attempt=launch.attempt, serves=launch.is_first and not launch.has_store, exclusive=not launch.has_store,
            patience=patience,
        )  # fmt: skip
    except RuntimeError as error:
        raise not_met(error, launch) or error from error
    finally:
        limit.cancel()


def _start(backend: str, launch: Launch, store: dist.Store | None, timeout_minutes: int) -> None:
    """Join the process group; a single process needs no port for it."""
    if store is None:
        start_processes(backend, rank=0, world_size=1, store=dist.HashStore(), timeout_minutes=timeout_minutes)
        return
    store.set_timeout(datetime.timedelta(minutes=timeout_minutes))
    try:
        start_processes(
            backend, rank=launch.rank, world_size=launch.world_size, store=store, timeout_minutes=timeout_minutes
        )
    except RuntimeError as error:
        raise not_met(error, launch) or error from error


def not_met(error: Exception, launch: Launch) -> UserError | None:
    """What a failure to join the other processes means to the user; None if it is something else."""
    said = " ".join(str(error).split())
    if "EADDRINUSE" in said or "address already in use" in said.lower():
        return UserError(
            f"MASTER_PORT={launch.master_port} is taken on this host by another program or job: set MASTER_PORT to a "
            "free port, the same for all processes of this job"
        )
    if launch.world_size == launch.local_world_size and not isinstance(
        error, (dist.DistNetworkError, dist.DistStoreError)
    ):
        return None
    if "gloo" in said.lower() or "interface" in said:
        return UserError(
            f"rank {launch.rank} does not reach the others over {GLOO}={os.environ.get(GLOO)}: set it to the "
            f"interface that the hosts share (`ip -br address` lists them), and let them connect to any port ({said})"
        )
    if isinstance(error, dist.DistError):
        return UserError(
            f"rank {launch.rank} does not meet the others at MASTER_ADDR={launch.master_address} "
            f"MASTER_PORT={launch.master_port}: they must name the first host and a port free there, on every host "
            f"({said})"
        )
    return None


def _watched(launch: Launch, store: dist.Store, timing: Timing) -> Liveness:
    def ended(line: str, status: int, speak: bool) -> NoReturn:
        end(line, status, speak=speak, linger=timing.linger)

    try:
        return Liveness(
            meeting=store, address=launch.master_address, port=launch.master_port, rank=launch.rank,
            world_size=launch.world_size, local_rank=launch.local_rank, local_world_size=launch.local_world_size,
            host=os.uname().nodename, ended=ended, timing=timing,
        )  # fmt: skip
    except RuntimeError as error:
        raise not_met(error, launch) or error from error


def _fail(error: BaseException, launch: Launch, peers: Liveness) -> NoReturn:
    """Tell the other processes what this one failed of, and end without waiting for any of them."""
    trace = "".join(traceback.format_exception(error))
    sys.stdout.flush()
    if isinstance(error, KeyboardInterrupt):
        peers.end("stopped", 130)
    if mendable := as_user_error(error):
        trace, line = "", f"error: {printable(str(mendable))}"
        if not launch.is_first:
            time.sleep(_FIRST_SPEAKS_SECONDS)
    else:
        line = f"error: {type(error).__name__}: {' '.join(str(error).split())}"
        if _of_the_network(error):
            # most likely because another process is gone: the heartbeat's thread then ends this one with its name
            peers.alarm()
            time.sleep(peers.timing.verdict)
    peers.end(line, 1, trace=trace)


def _of_the_network(error: BaseException) -> bool:
    """Whether a collective failed, which is not a reason by itself."""
    words = ("gloo", "nccl", "hccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))
