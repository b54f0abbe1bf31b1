"""What keeps a fused operator from taking its arguments, found out the same way on every rank and said once."""

from __future__ import annotations

import functools
import logging
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells hosts apart that carry the same name
_answers: weakref.WeakKeyDictionary[dist.ProcessGroup, list[Any]] = weakref.WeakKeyDictionary()


def failed(*checks: tuple[bool, str]) -> tuple[str, ...]:
    """The reasons of the checks that were not passed."""
    return tuple(reason for passed, reason in checks if not passed)


@functools.cache
def report(operator: str, reasons: tuple[str, ...]) -> None:
    """Once for each operator and reasons: a slower path must not be taken in silence."""
    logging.getLogger(__name__).warning("%s is replaced by plain PyTorch: %s", operator, "; ".join(reasons))


def product_limits(
    x: Tensor, weight: Tensor, *, device_type: str, dtypes: tuple[torch.dtype, ...], parts: int
) -> tuple[str, ...]:
    """What keeps x [n, k] @ weight [m, k]^T from being joined with a collective; empty if nothing.

    No number of tokens is named: it can differ from step to step, and each reason is a line of its own.

    Args:
        parts: the rows of the result are dealt out to so many ranks; 1 for a gather.
    """
    matrices = x.dim() == weight.dim() == 2
    return failed(
        (x.device.type == device_type, f"x is on {x.device.type}"),
        (weight.device == x.device, f"weight is on {weight.device}, x on {x.device}"),
        (x.dtype in dtypes, f"dtype {x.dtype}"),
        (weight.dtype == x.dtype, f"weight is {weight.dtype}, x {x.dtype}"),
        (matrices, f"x has {x.dim()} dimensions, weight {weight.dim()}; both need 2"),
        (not matrices or x.shape[1] == weight.shape[1], f"x has {x.shape[-1]} columns, weight {weight.shape[-1]}"),
        (x.numel() > 0 and weight.numel() > 0, "x or weight is empty"),
        (x.is_contiguous(), "x is a strided view"),
        (x.shape[0] % parts == 0, f"the rows of x do not divide by {parts}"),
        (not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)), "it has no derivative"),
    )


def of_all_ranks(group: dist.ProcessGroup, mine: Callable[[], Any]) -> list[Any]:
    """What `mine()` is on each rank of `group`, asked once for a group. All its ranks must come here together."""
    if group not in _answers:
        answers: list[Any] = [None] * group.size()
        dist.all_gather_object(answers, mine(), group=group)
        _answers[group] = answers
    return _answers[group]


def host() -> str:
    """The same for processes of one host, different for processes of two."""
    return f"{socket.gethostname()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}"
