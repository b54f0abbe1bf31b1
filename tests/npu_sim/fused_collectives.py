"""What torch_npu's MC2 operators mean: a matrix product and a collective of plain PyTorch, one after the other.

They take the name that HCCL has for the group, look the group up by it and communicate through torch_npu's own
ProcessGroupHCCL, so over the simulated HCCL. What their C++ and CANN check of the arguments is checked here.

Letters: n rows of one rank, t ranks, k and m inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_COLUMNS = range(256, 65535)


def all_gather_base_mm(
    x: Tensor, x2: Tensor, hcom: str, world_size: int, *, bias: Tensor | None = None, gather_index: int = 0,
    gather_output: bool = True, **other: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [n, k], x2 [k, m] -> gathered x @ x2 [t n, m], gathered x [t n, k]."""
    assert bias is None and gather_index == 0 and gather_output and not _given(other), "not simulated"
    group = _checked(x, x2, hcom, world_size)
    gathered = x.new_empty(world_size * x.shape[0], x.shape[1])
    dist.all_gather_into_tensor(gathered, x, group=group)
    return gathered @ x2, gathered


def mm_reduce_scatter_base(
    x: Tensor, x2: Tensor, hcom: str, world_size: int, *, reduce_op: str = "sum", bias: Tensor | None = None,
    **other: Any,
) -> Tensor:  # fmt: skip
    """x [t n, k], x2 [k, m] -> this rank's rows [n, m] of the sum over ranks of x @ x2."""
    assert bias is None and reduce_op == "sum" and not _given(other), "not simulated"
    group = _checked(x, x2, hcom, world_size)
    assert x.shape[0] % world_size == 0, f"{x.shape[0]} rows for {world_size} ranks"
    partial = x @ x2
    kept = partial.new_empty(x.shape[0] // world_size, x2.shape[1])
    dist.reduce_scatter_tensor(kept, partial, group=group)
    return kept


def _checked(x: Tensor, x2: Tensor, hcom: str, world_size: int) -> dist.ProcessGroup:
    """The group called `hcom`, with the documented limits of both operators."""
    group = _group_called(hcom)
    assert dist.get_world_size(group) == world_size and world_size in (2, 4, 8), f"{world_size} ranks"
    assert x.dim() == x2.dim() == 2 and x.shape[1] == x2.shape[0], f"{tuple(x.shape)} @ {tuple(x2.shape)}"
    assert x.shape[1] in _COLUMNS, f"k is {x.shape[1]}"
    assert x.dtype == x2.dtype and x.dtype in (torch.float16, torch.bfloat16), f"{x.dtype} and {x2.dtype}"
    assert x.is_contiguous() and (x2.is_contiguous() or x2.t().is_contiguous()), f"strides {x.stride()}, {x2.stride()}"
    return group


def _group_called(hcom: str) -> dist.ProcessGroup:
    assert hcom, "a communicator without a name"
    for group in dist.distributed_c10d._world.pg_map:
        backend = group._get_backend(torch.device("npu"))
        # communicators that nobody has used yet are left alone: to set one up takes all of its ranks
        if backend.get_hccl_comm_name(dist.get_rank(), init_comm=False) == hcom:
            return group
    raise AssertionError(f"no group of this process has the communicator {hcom}")


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value not in (None, 0)}


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_all_gather_base_mm": all_gather_base_mm,
    "npu_mm_reduce_scatter_base": mm_reduce_scatter_base,
}
