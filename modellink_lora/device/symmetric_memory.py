"""PyTorch's fused all-gather + matmul and matmul + reduce-scatter over symmetric memory, each behind its limits.

Symmetric memory is memory of one GPU that the others of its host read directly. The operators cut the work into one
block a rank and copy one block while another is multiplied. Letters: n tokens of one rank, t ranks of the group, k and
m inputs and outputs of the linear.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from modellink_lora.device.limits import failed, host, of_all_ranks, product_limits, report

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Peer:
    """A rank's place: its host, its device's index there, and the indices whose memory the device reaches."""

    host: str
    index: int
    reaches: frozenset[int]


def gather_matmul(
    x: Tensor, weight: Tensor, group: ProcessGroup, *, device_type: str = "cuda"
) -> tuple[Tensor, Tensor] | None:
    """x [n, k], weight [m, k] -> (P @ weight^T [t n, m], P [t n, k]) with P the gathered x; None outside the limits.

    Args:
        device_type: whose tensors are taken; another device needs kernels of the operators of its own.
    """
    reasons = _reasons(x, weight, group, device_type, parts=1)
    if reasons:
        report("fused_all_gather_matmul", reasons)
        return None
    gathered, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(x, [weight.t()], 0, group.group_name)
    return product, gathered


def matmul_scatter(x: Tensor, weight: Tensor, group: ProcessGroup, *, device_type: str = "cuda") -> Tensor | None:
    """x [t n, k], weight [m, k] -> rows [n, m] of the sum over ranks of x @ weight^T; None outside the limits.

    Args:
        device_type: as in `gather_matmul`.
    """
    reasons = _reasons(x, weight, group, device_type, parts=group.size())
    if reasons:
        report("fused_matmul_reduce_scatter", reasons)
        return None
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight.t(), "sum", 0, group.group_name)


def peer_limits(peers: list[Peer]) -> tuple[str, ...]:
    """What keeps these ranks from reading each other's memory; empty if nothing."""
    indices = {peer.index for peer in peers}
    return failed(
        (len(peers) > 1, "the group has one rank"),
        (len({peer.host for peer in peers}) == 1, "the group's ranks are on several hosts"),
        # the allocator compares the indices that the processes know their devices by
        (len(indices) == len(peers), "ranks share a GPU index; each process must see all GPUs of the host"),
        (all(indices <= peer.reaches for peer in peers), "not every GPU of the group reaches the memory of the others"),
    )


def _reasons(x: Tensor, weight: Tensor, group: ProcessGroup, device_type: str, *, parts: int) -> tuple[str, ...]:
    # arguments first: they are alike on all ranks, so all or none of them go on to ask each other
    return (
        product_limits(x, weight, device_type=device_type, dtypes=_DTYPES, parts=parts)
        or _missing_operators()
        or peer_limits(of_all_ranks(group, lambda: _peer(x.device, group)))
    )


def _missing_operators() -> tuple[str, ...]:
    try:
        importlib.import_module("torch.distributed._symmetric_memory")  # defines the operators
    except ImportError:
        return (f"torch {torch.__version__} has no symmetric memory",)
    names = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
    return failed(*((hasattr(torch.ops.symm_mem, name), f"torch {torch.__version__} has no {name}") for name in names))


def _peer(device: torch.device, group: ProcessGroup) -> Peer:
    if device.type != "cuda":
        return Peer(host(), group.rank(), frozenset(range(group.size())))
    own = device.index
    others = (i for i in range(torch.cuda.device_count()) if i != own)
    reached = {i for i in others if torch.cuda.can_device_access_peer(own, i)}
    return Peer(host(), own, frozenset(reached | {own}))
