"""Joining the processes of a multi-process job: the device made active, the process group entered and left."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from modellink_lora.cli.launch import Launch, set_environment_defaults
from modellink_lora.device import Device, get_device
from modellink_lora.parallel.context import start_processes


@contextlib.contextmanager
def joined(
    launch: Launch, *, device: str, timeout_minutes: int, deterministic: bool = False
) -> Iterator[tuple[Device, torch.device]]:
    """The active device and this process's torch device, inside the default process group.

    Code that imports megatron-core must be imported inside the block, when the device is active.

    Args:
        device: a device's name, or "auto" for what the environment says.
    """
    chosen = get_device(device if device != "auto" else launch.device)
    set_environment_defaults(chosen.name, deterministic=deterministic)
    # megatron-core warns about optional GPU libraries at every start; none of them is used here
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    torch_device = chosen.activate(launch.local_rank)
    start_processes(
        chosen.backend,
        rank=launch.rank,
        world_size=launch.world_size,
        init_method=f"tcp://{launch.master_address}:{launch.master_port}" if launch.world_size == 1 else "env://",
        timeout_minutes=timeout_minutes,
    )
    try:
        yield chosen, torch_device
    finally:
        dist.destroy_process_group()
