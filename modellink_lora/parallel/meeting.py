"""Where the processes of a job meet before they form groups: a store on the first host, and who has not come to it."""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

from modellink_lora.config.errors import UserError

_LOOK_SECONDS = 0.2


def meet(
    *,
    address: str,
    port: int,
    rank: int,
    world_size: int,
    attempt: str,
    serves: bool,
    patience: float,
    exclusive: bool = False,
) -> dist.Store:
    """The job's store, once all processes have come to it.

    A process that dies before it has come is known to nobody but its launcher, so the others must not wait for ever.

    Args:
        attempt: differs when a launcher starts the processes anew beside a store that it keeps.
        serves: this process holds the store. Else rank 0 does, or the launcher.
        patience: seconds that the others may come later than this process.
        exclusive: no launcher keeps the store: a rank that is there already belongs to another job on the same port.
    """
    began = time.monotonic()
    store = dist.TCPStore(
        address, port, is_master=serves, wait_for_workers=False, timeout=datetime.timedelta(seconds=patience)
    )
    here = [f"meeting/{attempt}/{each}" for each in range(world_size)]
    mine = f"{world_size} {uuid.uuid4().hex}"
    if not exclusive:
        store.set(here[rank], mine)
    elif store.compare_set(here[rank], "", mine).decode() != mine:
        raise _taken(port)
    while not store.check(here):
        if time.monotonic() > began + patience:
            absent = " ".join(str(each) for each, key in enumerate(here) if not store.check([key]))
            raise UserError(
                f"rank(s) {absent} of {world_size} did not start within {patience:.0f} s of rank {rank}: "
                "the log of their host says why"
            )
        time.sleep(_LOOK_SECONDS)
    if exclusive and store.get(here[0]).decode().split()[0] != str(world_size):
        raise _taken(port)
    return dist.PrefixStore(f"job/{attempt}", store)


def _taken(port: int) -> UserError:
    return UserError(
        f"MASTER_PORT={port} is taken by another job: set MASTER_PORT to a free port, the same for all processes of "
        "this job"
    )
