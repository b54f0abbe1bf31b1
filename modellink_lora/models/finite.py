"""Weights that are NaN or infinite, or become so in the dtype they are loaded in: found before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from modellink_lora.config.errors import UserError


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is finite, also when it is rounded to `dtype`.

    The extremes tell it, NaN included, many times faster than looking at each value: rounding keeps their order.
    """
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).to(dtype).isfinite().all())


def check_weight(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise UserError for a weight, called `name` in the message, that `fits` refuses."""
    if fits(tensor, dtype):
        return
    if not fits(tensor, tensor.dtype):
        raise UserError(
            f"{name}: holds NaN or infinity, so the model computes nothing: training diverged, or a file is damaged; "
            "choose an earlier checkpoint"
        )
    kind = str(dtype).removeprefix("torch.")
    raise UserError(
        f"{name}: the value {tensor.abs().max().item():.3g} is beyond the {torch.finfo(dtype).max:.3g} of {kind}: "
        "compute in bf16 (--bf16) or fp32 (neither flag)"
    )
