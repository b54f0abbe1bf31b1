"""W' = W + scaling * B A, computed so that every layout and block size gives the same bits. Pure tensor arithmetic.

The factors have at most 24 significant bits, so each product b * a is exact in fp64 and only the order of the r
additions could matter: it is fixed here, rank by rank, element by element (a matrix product would choose its own).
The sum is rounded once, to the dtype asked for. Letters: r rank; W is [out, in], B [out, r], A [r, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from modellink_lora.config.errors import UserError

_LOST = (1 << 29) - 1  # the bits of an fp64 significand (53) below those of an fp32 one (24)


def merge(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, dtype: torch.dtype | None = None, rows: int = 64
) -> Tensor:
    """The weight with its adapter folded in, in `dtype` (the weight's own by default).

    Args:
        rows: output rows in memory as fp64 at a time; it changes speed only.
    Raises:
        UserError: a value that was finite is not in the result's dtype.
    """
    assert lora_A.dtype != torch.float64 != lora_B.dtype, "products of fp64 factors would not be exact"
    assert lora_A.shape[0] == lora_B.shape[1] and weight.shape == (lora_B.shape[0], lora_A.shape[1])
    result = torch.empty(weight.shape, dtype=dtype or weight.dtype)
    a = lora_A.double()  # [r, in]
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        b = lora_B[block].double()  # [rows, r]
        exact = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
        for k in range(a.shape[0]):
            exact.addcmul_(b[:, k : k + 1], a[k : k + 1])
        # two operations, not add(..., alpha=): a fused multiply-add would round differently where it is not available
        exact.mul_(scaling).add_(weight[block].double())
        result[block] = round_once(exact, result.dtype)
        if not result[block].isfinite().all() and exact.isfinite().all():
            raise UserError(
                f"the merged weight reaches {exact.abs().max().item():.3g}, which does not fit {result.dtype}: "
                "choose --params-dtype bf16 or fp32"
            )
    return result


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 rounded to nearest, ties to even.

    torch takes 16-bit types through fp32 and so rounds twice. Rounding to the 24 bits of fp32 "to odd" first (cut off,
    and set the last bit if anything was lost) leaves nothing to the step to fp32 and decides every tie of the last one.
    """
    if dtype in (torch.float32, torch.float64):
        return exact.to(dtype)
    bits = exact.view(torch.int64)
    # adding _LOST to the lost bits carries into the last kept bit exactly when one of them is set
    odd = ((bits & _LOST) + _LOST).bitwise_or_(bits).bitwise_and_(~_LOST)
    return odd.view(torch.float64).to(dtype)
