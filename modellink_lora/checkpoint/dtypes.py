"""The three dtypes of weights: their short names, and conversion that never overflows unnoticed."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from modellink_lora.config.errors import UserError
from modellink_lora.models.finite import fits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype, *, where: str) -> str:
    """`fp32`, `bf16` or `fp16`. Raises UserError for quantised and other weights."""
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise UserError(f"{where}: weights of dtype {dtype} are not supported; supported are float32, bfloat16, float16")


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds every value of all of them."""
    return functools.reduce(torch.promote_types, dtypes)


def loses(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether values of `source` are rounded in `target`."""
    return torch.promote_types(source, target) != target


def convert(tensor: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    """`tensor` in `dtype`. Raises UserError when a finite value becomes infinite (fp16 ends at 65504, bf16 at 3e38)."""
    if tensor.dtype == dtype:
        return tensor
    most = torch.finfo(dtype).max
    if most < torch.finfo(tensor.dtype).max and fits(tensor, tensor.dtype) and not fits(tensor, dtype):
        largest, short = tensor.abs().max().item(), dtype_name(dtype, where=name)
        others = "bf16 or fp32" if dtype == torch.float16 else "fp32"
        fault = f"{name}: the value {largest:.3g} does not fit --params-dtype {short} ({most:.5g})"
        raise UserError(f"{fault}; use {others}")
    return tensor.to(dtype)
