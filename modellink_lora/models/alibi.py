"""Slopes of ALiBi (Press et al., arXiv:2108.12409): how fast each head forgets what is far away. Pure."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slopes(heads: int) -> Tensor:
    """fp32 [heads]: powers of 2^(-8 / n) for n heads, n a power of two.

    Other numbers of heads take those of the next lower power of two, then every second one of twice as many.
    """
    lower = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2 ** (-4 * (2 * i + 1) / lower) for i in range(heads - lower)]
    return torch.tensor(first + between, dtype=torch.float32)
