"""Who am I among the processes: sizes, ranks and groups as one value. The only reader of megatron's parallel_state."""

from __future__ import annotations

import contextlib
import datetime
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.megatron.versions import check_version


@dataclass(frozen=True)
class ParallelContext:
    """This process in the layout: `rank` of `size` along tensor (tp), pipeline (pp) and data (dp) parallelism."""

    config: ParallelConfig
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup

    @property
    def sequence_parallel(self) -> bool:
        return self.config.sequence_parallel and self.tp_size > 1

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this process speaks to the user."""
        return self.rank == 0


def start_processes(
    backend: str,
    *,
    rank: int,
    world_size: int,
    timeout_minutes: int,
    init_method: str | None = None,
    store: dist.Store | None = None,
) -> None:
    """Join the default process group, by a store or an address of one. Gloo stands beside a device backend for CPU."""
    spec = backend if backend == "gloo" else f"cpu:gloo,{'cuda' if backend == 'nccl' else 'npu'}:{backend}"
    dist.init_process_group(
        spec,
        rank=rank,
        world_size=world_size,
        init_method=init_method,
        store=store,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


def collective_timeout() -> datetime.timedelta:
    """How long collectives of the default process group wait, and so those of all groups: `start_processes` says it.

    torch gives a new group half an hour, whatever the default group has.
    """
    assert dist.group.WORLD is not None
    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))
    timeout: datetime.timedelta = backend.options._timeout
    return timeout


def make_context(config: ParallelConfig, device: torch.device) -> ParallelContext:
    """Lay the processes out as `config` says. Raises UserError when their number or megatron-core does not fit."""
    check_version()
    from megatron.core import parallel_state

    from modellink_lora.megatron.differences import process_groups

    config.data_parallel_size(dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        _close_groups()
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        distributed_timeout_minutes=math.ceil(collective_timeout().total_seconds() / 60),
    )
    cpu = torch.device("cpu")
    for group in process_groups():  # megatron-core hands the time-out to most of them, and not to some of gloo
        if isinstance(group, dist.ProcessGroup) and cpu in group._device_types:
            backend: Any = group._get_backend(cpu)
            backend._set_default_timeout(collective_timeout())
    return ParallelContext(
        config=config,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


def _close_groups() -> None:
    """Close the groups of the former layout. megatron-core would only forget its two dozen, and gloo's threads poll."""
    from megatron.core import parallel_state

    from modellink_lora.megatron.differences import process_groups

    for group in process_groups():
        with contextlib.suppress(ValueError):  # closed already, together with a former group of all processes
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
