"""The r-wide operations of a LoRA linear as Triton kernels: one read of the wide matrix each, masks hashed on the way.

Not run on a GPU so far: checked in triton's interpreter, and compiled for an H100. What is outside the kernels' limits
is done by the plain operations, with one logged line for each reason. Letters: n tokens, i inputs, o outputs, r rank; w
the columns of the wide matrix, inputs or outputs.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from modellink_lora.device.hashing import threshold
from modellink_lora.device.limits import failed, report
from modellink_lora.device.lora_ops import LoraOps, Mask

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_R = 128
_MOST_R_OF_ONE_PASS = 32  # beyond, the partial sums of `up_gradients` are as large as the second read that they save
_PROGRAMS = 264  # two for each multiprocessor of an H200; a constant, so that sums are cut alike on every GPU
_LINES = 32  # of partial sums that one program adds up
WARPS = 8  # with 4, the larger tiles do not fit the registers


@functools.cache
def available() -> bool:
    """Whether triton is installed and there is an NVIDIA GPU with bf16 tensor cores."""
    if importlib.util.find_spec("triton") is None or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def tile(dtype: torch.dtype, r: int, *, one_pass: bool) -> tuple[int, int]:
    """Rows and columns of the wide matrix that a program holds at a time, for factors of `dtype`.

    Compiled for an H100, these leave no register spilled and need at most 89 KiB of shared memory.
    """
    if dtype == torch.float32:
        return 32, 64
    return (32, 256 if r <= 64 else 128) if one_pass else (64, 128)


class TritonLoraOps(LoraOps):
    """LoraOps for tensors on a GPU: the values of the plain operations up to the order of sums, with the same masks.

    Block shapes follow from the tensors' shapes alone, without autotuning: a run can be repeated bit for bit.

    Args:
        interpret: for tests without a GPU: tensors are on the CPU, and TRITON_INTERPRET was 1 when triton was imported.
    """

    def __init__(self, *, interpret: bool = False) -> None:
        self.interpret = interpret

    def down(self, x: Tensor, A: Tensor, mask: Mask | None, scale: float = 1.0) -> Tensor:
        reasons = self._limits(x, right=A.t(), mask=mask)
        if reasons:
            report("Triton's down", reasons)
            return super().down(x, A, mask, scale)
        from modellink_lora.device.lora_kernels import down_kernel

        (n, w), r = x.shape, len(A)
        height, width = tile(A.dtype, r, one_pass=False)
        row_blocks = _blocks(n, height)
        columns_each = _blocks(_blocks(w, width), _blocks(_PROGRAMS, row_blocks)) * width
        sums = x.new_empty((_blocks(w, columns_each), n, r), dtype=torch.float32)
        down_kernel[(row_blocks, len(sums))](
            x, A, sums, *_hash_inputs(mask, x), n, w, r, columns_each, _limit(mask),
            x.stride(0), A.stride(1), A.stride(0),
            MASKED=mask is not None, WIDEN=self.interpret, N=height, W=width, R=padded(r), num_warps=WARPS,
        )  # fmt: skip
        low = A.new_empty((n, r))
        _add_up(sums, low, scale)
        return low

    def up_gradients(self, dy: Tensor, B: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        reasons = self._limits(dy, right=B, left=low)
        if reasons:
            report("Triton's up_gradients", reasons)
        if reasons or B.shape[1] > _MOST_R_OF_ONE_PASS:
            return super().up_gradients(dy, B, low)
        U, dB = low.new_empty(low.shape), B.new_empty(B.shape)
        self._one_pass(dy, right=B, left=low, mask=None, low=U, gradient=dB)
        return U, dB

    def add_input_gradient(self, dx: Tensor, U: Tensor, A: Tensor, scale: float, mask: Mask | None) -> None:
        reasons = self._limits(dx, right=A.t(), left=U, mask=mask)
        if reasons:
            report("Triton's add_input_gradient", reasons)
            return super().add_input_gradient(dx, U, A, scale, mask)
        from modellink_lora.device.lora_kernels import add_kernel

        (n, w), r = dx.shape, len(A)
        height, width = tile(A.dtype, r, one_pass=False)
        add_kernel[(_blocks(n, height), _blocks(w, width))](
            dx, U, A, *_hash_inputs(mask, dx), n, w, r, float(scale), _limit(mask),
            dx.stride(0), *U.stride(), *A.stride(),
            MASKED=mask is not None, WIDEN=self.interpret, N=height, W=width, R=padded(r), num_warps=WARPS,
        )  # fmt: skip

    def down_gradient(self, U: Tensor, x: Tensor, mask: Mask | None, scale: float = 1.0) -> Tensor:
        reasons = self._limits(x, left=U, mask=mask)
        if reasons:
            report("Triton's down_gradient", reasons)
            return super().down_gradient(U, x, mask, scale)
        gradient = U.new_empty((U.shape[1], x.shape[1]))
        self._one_pass(x, right=None, left=U, mask=mask, low=None, gradient=gradient.t(), scale=scale)
        return gradient

    def _one_pass(
        self,
        x: Tensor,
        *,
        right: Tensor | None,
        left: Tensor,
        mask: Mask | None,
        low: Tensor | None,
        gradient: Tensor,
        scale: float = 1.0,
    ) -> None:
        """gradient [w, r] = scale * x^T left [n, r]; low [n, r] = x right [w, r] where it is wanted."""
        from modellink_lora.device.lora_kernels import pass_kernel

        (n, w), r = x.shape, left.shape[1]
        height, width = tile(left.dtype, r, one_pass=True)
        column_blocks = _blocks(w, width)
        rows_each = _blocks(_blocks(n, height), _blocks(_PROGRAMS, column_blocks)) * height
        gradient_sums = x.new_empty((_blocks(n, rows_each), w, r), dtype=torch.float32)
        low_sums = x.new_empty((column_blocks, n, r) if low is not None else (1, 1, 1), dtype=torch.float32)
        right = left if right is None else right  # a pointer that is not followed
        pass_kernel[(len(gradient_sums), column_blocks)](
            x, right, left, low_sums, gradient_sums, *_hash_inputs(mask, x), n, w, r, rows_each, _limit(mask),
            x.stride(0), *right.stride(), *left.stride(),
            LOW=low is not None, MASKED=mask is not None, WIDEN=self.interpret,
            N=height, W=width, R=padded(r), num_warps=WARPS,
        )  # fmt: skip
        _add_up(gradient_sums, gradient, scale)
        if low is not None:
            _add_up(low_sums, low, 1.0)

    def _limits(
        self, x: Tensor, *, right: Tensor | None = None, left: Tensor | None = None, mask: Mask | None = None
    ) -> tuple[str, ...]:
        """What keeps the kernels from taking x [n, w] with factors right [w, r], left [n, r]; empty if nothing."""
        factors = [factor for factor in (right, left) if factor is not None]
        n, w, r = *x.shape, factors[0].shape[1]
        assert (right is None or right.shape == (w, r)) and (left is None or left.shape == (n, r)), "shapes do not fit"
        assert mask is None or (mask.rows.shape, mask.columns.shape) == ((n,), (w,)), "mask of another shape"
        dtypes = {factor.dtype for factor in factors}
        return failed(
            (x.device.type == ("cpu" if self.interpret else "cuda"), f"input is on {x.device.type}"),
            (self.interpret or available(), "no triton, or no NVIDIA GPU since Ampere"),
            (x.dtype in _DTYPES, f"input is {x.dtype}"),
            (dtypes <= set(_DTYPES) and len(dtypes) == 1, f"factors are {sorted(map(str, dtypes))}"),
            (x.numel() > 0, "input is empty"),
            (x.stride(1) == 1, "elements of a row lie apart"),
            (0 < r <= _MOST_R, f"rank {r}, at most {_MOST_R}"),
        )


def _add_up(sums: Tensor, out: Tensor, scale: float) -> None:
    """out [lines, r] = scale * sums [parts, lines, r] over the parts, rounded once."""
    from modellink_lora.device.lora_kernels import sum_kernel

    parts, lines, r = sums.shape
    grid = (_blocks(lines, _LINES),)
    sum_kernel[grid](sums, out, lines, r, parts, float(scale), *out.stride(), L=_LINES, R=padded(r), num_warps=4)


def _hash_inputs(mask: Mask | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Row keys and column numbers; without a mask pointers that are not followed."""
    return (x, x) if mask is None else (mask.rows.contiguous(), mask.columns.contiguous())


def _limit(mask: Mask | None) -> int:
    return 0 if mask is None else threshold(mask.p)


def _blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def padded(r: int) -> int:
    """A tile's width: a power of two, and no less than the tensor cores take."""
    return max(16, 1 << (r - 1).bit_length())
