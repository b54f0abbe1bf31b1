"""Triton kernels of the r-wide operations. Importing this file imports triton; lora_triton.py does, when it launches.

Letters: n rows (tokens), w columns of the wide matrix (inputs or outputs), r rank, R = r padded to a power of two.
Each kernel reads the wide matrix once. Sums over many blocks are written apart, block by block, and added up by a
second kernel in a fixed order: atomic additions would change the last bits from run to run.
"""

# no `from __future__ import annotations`: triton reads the annotations of a kernel's arguments

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """hashing.mix for uint32, where `>>` shifts zeros in."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
def kept(row_keys, column_numbers, rows, columns, n, w, limit):
    """hashing.dropped, negated, for rows [N] and columns [W] of the matrix -> bool [N, W]"""
    keys = tl.load(row_keys + rows, mask=rows < n, other=0).to(tl.uint32, bitcast=True)
    places = mix(tl.load(column_numbers + columns, mask=columns < w, other=0).to(tl.uint32, bitcast=True))
    return mix(keys[:, None] ^ places[None, :]).to(tl.int32, bitcast=True) >= limit


@triton.jit
def tile(x, rows, columns, n, w, row_stride, column_stride):
    """Elements (rows, columns) of x [n, w], zeros outside of it. 64-bit offsets: x may hold over 2^31 elements."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(x + offsets, mask=(rows[:, None] < n) & (columns[None, :] < w), other=0.0)


@triton.jit
def multiply(left, right, WIDEN: tl.constexpr):
    """Matrix product accumulated in fp32; fp32 factors are not rounded to TensorFloat-32.

    WIDEN: for triton's interpreter, whose product of bf16 tiles is wrong.
    """
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def down_kernel(
    x, factor, sums, row_keys, column_numbers,
    n, w, r, columns_each, limit,
    x_stride, factor_w_stride, factor_r_stride,
    MASKED: tl.constexpr, WIDEN: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """sums [parts, n, r]: part k is x [n, w] times factor [w, r] over columns k * columns_each and on."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1)
    ranks = tl.arange(0, R)
    total = tl.zeros((N, R), dtype=tl.float32)
    for start in range(part * columns_each, min((part + 1) * columns_each, w), W):
        columns = start + tl.arange(0, W)
        right = tile(factor, columns, ranks, w, r, factor_w_stride, factor_r_stride)
        left = tile(x, rows, columns, n, w, x_stride, 1).to(right.dtype)
        if MASKED:
            left = tl.where(kept(row_keys, column_numbers, rows, columns, n, w, limit), left, 0.0)
        total += multiply(left, right, WIDEN)
    out = (part.to(tl.int64) * n + rows)[:, None] * r + ranks[None, :]
    tl.store(sums + out, total, mask=(rows[:, None] < n) & (ranks[None, :] < r))


@triton.jit
def pass_kernel(
    x, right_factor, left_factor, low_sums, gradient_sums, row_keys, column_numbers,
    n, w, r, rows_each, limit,
    x_stride, right_w_stride, right_r_stride, left_n_stride, left_r_stride,
    LOW: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One read of x [n, w] for its products with a factor on either side.

    gradient_sums [parts, w, r]: part k is x^T times left_factor [n, r] over rows k * rows_each and on.
    low_sums [w blocks, n, r], with LOW: block k is x times right_factor [w, r] over columns k * W and on.
    """
    part = tl.program_id(0)
    block = tl.program_id(1)
    columns = block * W + tl.arange(0, W)
    ranks = tl.arange(0, R)
    if LOW:
        right = tile(right_factor, columns, ranks, w, r, right_w_stride, right_r_stride)
    total = tl.zeros((W, R), dtype=tl.float32)
    for start in range(part * rows_each, min((part + 1) * rows_each, n), N):
        rows = start + tl.arange(0, N)
        left = tile(left_factor, rows, ranks, n, r, left_n_stride, left_r_stride)
        wide = tile(x, rows, columns, n, w, x_stride, 1).to(left.dtype)
        if MASKED:
            wide = tl.where(kept(row_keys, column_numbers, rows, columns, n, w, limit), wide, 0.0)
        if LOW:
            low = multiply(wide, right, WIDEN)
            out = (block.to(tl.int64) * n + rows)[:, None] * r + ranks[None, :]
            tl.store(low_sums + out, low, mask=(rows[:, None] < n) & (ranks[None, :] < r))
        total += multiply(tl.trans(wide), left, WIDEN)
    out = (part.to(tl.int64) * w + columns)[:, None] * r + ranks[None, :]
    tl.store(gradient_sums + out, total, mask=(columns[:, None] < w) & (ranks[None, :] < r))


@triton.jit
def sum_kernel(sums, out, lines, r, parts, scale, line_stride, r_stride, L: tl.constexpr, R: tl.constexpr):
    """out [lines, r], of any strides and dtype, = scale * sums [parts, lines, r], added up in order."""
    at = tl.program_id(0) * L + tl.arange(0, L)
    ranks = tl.arange(0, R)
    inside = (at[:, None] < lines) & (ranks[None, :] < r)
    total = tl.zeros((L, R), dtype=tl.float32)
    places = sums + at.to(tl.int64)[:, None] * r + ranks[None, :]
    for _ in range(parts):
        total += tl.load(places, mask=inside, other=0.0)
        places += lines * r
    targets = out + at.to(tl.int64)[:, None] * line_stride + ranks.to(tl.int64)[None, :] * r_stride
    tl.store(targets, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_kernel(
    dx, U, A, row_keys, column_numbers,
    n, w, r, scale, limit,
    dx_stride, u_n_stride, u_r_stride, a_r_stride, a_w_stride,
    MASKED: tl.constexpr, WIDEN: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dx [n, w] += scale * (U [n, r] A [r, w] without dropped elements), rounded once."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    columns = tl.program_id(1) * W + tl.arange(0, W)
    ranks = tl.arange(0, R)
    left = tile(U, rows, ranks, n, r, u_n_stride, u_r_stride)
    right = tile(A, ranks, columns, r, w, a_r_stride, a_w_stride)
    added = multiply(left, right, WIDEN) * scale
    if MASKED:
        added = tl.where(kept(row_keys, column_numbers, rows, columns, n, w, limit), added, 0.0)
    places = dx + rows.to(tl.int64)[:, None] * dx_stride + columns[None, :]
    inside = (rows[:, None] < n) & (columns[None, :] < w)
    before = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, (before + added).to(dx.dtype.element_ty), mask=inside)
