"""The hash that dropout masks are made of: int32 in, noise out, the same bits on every device.

An element of a mask is a function of its row's key and its column's global number, so any block of a mask can be made
alone, and made again.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

# MurmurHash3's 32-bit finalizer (public domain): x ^= x >> 16; x *= FIRST; x ^= x >> 13; x *= SECOND; x ^= x >> 16
FIRST = 0x85EBCA6B
SECOND = 0xC2B2AE35
_IN_CACHE = 2**15  # 32-bit elements: with as much scratch, half of a small L2 cache


def mix(x: Tensor) -> Tensor:
    """int32 -> int32, a bijection that turns counters into noise.

    int32 throughout: products wrap alike on every device, and `>>` keeps the sign, so its copies are masked away.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * (FIRST - 2**32)
    x ^= (x >> 13) & 0x7FFFF
    x *= SECOND - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def threshold(probability: float) -> int:
    """The int32 below which that share of all hashes lies."""
    return int(probability * 2**32) - 2**31


def dropped(rows: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Which elements dropout takes: bool, of the shape that row keys and column numbers (int32) broadcast to.

    An element goes when its hash, uniform over the int32 range, lies in the lowest part of size `probability`.
    """
    if rows.device.type == "cpu" and rows.dim() > 0 and rows.shape[-1] == 1 and columns.dim() == 1:
        out = torch.empty(*rows.shape[:-1], len(columns), dtype=torch.bool)
        keys, places = (x.numpy().view(numpy.uint32) for x in (rows.reshape(-1), mix(columns)))
        _dropped_numpy(keys, places, threshold(probability), out.view(len(keys), len(places)).numpy())
        return out
    return mix(rows ^ mix(columns)) < threshold(probability)


def _dropped_numpy(keys: numpy.ndarray, places: numpy.ndarray, limit: int, out: numpy.ndarray) -> None:
    """`dropped` for uint32 keys [n] and mixed column numbers [i], into out [n, i].

    PyTorch shifts no unsigned integers on a CPU. numpy does, in vector instructions: 10 passes instead of 15, over
    blocks that stay in the cache. That is 10 times faster.
    """
    step = max(1, _IN_CACHE // max(1, len(places)))
    x = numpy.empty((min(step, len(keys)), len(places)), numpy.uint32)
    spare = numpy.empty_like(x)
    for start in range(0, len(keys), step):
        part = keys[start : start + step, None]
        if len(part) < len(x):
            x, spare = x[: len(part)], spare[: len(part)]
        numpy.bitwise_xor(part, places, out=x)
        for shift, factor in ((16, FIRST), (13, SECOND), (16, None)):
            numpy.right_shift(x, shift, out=spare)
            numpy.bitwise_xor(x, spare, out=x)
            if factor is not None:
                numpy.multiply(x, numpy.uint32(factor), out=x)
        numpy.less(x.view(numpy.int32), numpy.int32(limit), out=out[start : start + step])
