"""Where the processes of a job meet before they form groups: a store on the first host, and who has not come to it."""

from __future__ import annotations

import datetime
import time

import torch.distributed as dist

from modellink_lora.config.errors import UserError

_LOOK_SECONDS = 0.2


def meet(
    *, address: str, port: int, rank: int, world_size: int, attempt: str, serves: bool, patience: float
) -> dist.Store:
    """The job's store, once all processes have come to it.

    A process that dies before it has come is known to nobody but its launcher, so the others must not wait for ever.

    Args:
        attempt: differs when a launcher starts the processes anew beside a store that it keeps.
        serves: this process holds the store. Else rank 0 does, or the launcher.
        patience: seconds that the others may come later than this process.
    """
    began = time.monotonic()
    store = dist.TCPStore(
        address, port, is_master=serves, wait_for_workers=False, timeout=datetime.timedelta(seconds=patience)
    )
    here = [f"meeting/{attempt}/{each}" for each in range(world_size)]
    store.set(here[rank], "")
    while not store.check(here):
        if time.monotonic() > began + patience:
            absent = " ".join(str(each) for each, key in enumerate(here) if not store.check([key]))
            raise UserError(
                f"rank(s) {absent} of {world_size} did not start within {patience:.0f} s of rank {rank}: "
                "the log of their host says why"
            )
        time.sleep(_LOOK_SECONDS)
    return dist.PrefixStore(f"job/{attempt}", store)
