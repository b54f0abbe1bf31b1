"""The Triton kernels without a GPU: run by triton's interpreter beside the plain operations, or compiled only.

A program of its own, because triton reads TRITON_INTERPRET when it is imported:
    TRITON_INTERPRET=1 python -m tests.helpers.triton_program interpret RESULTS.pt
    python -m tests.helpers.triton_program compile
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from modellink_lora.device import lora_triton
from modellink_lora.device.lora_ops import LoraOps, Mask
from modellink_lora.device.lora_triton import TritonLoraOps

# (n, w, r): tiles are 32 or 64 rows and 64 to 256 columns, so that no size but the second fills its tiles
SHAPES = [(37, 70, 3), (64, 256, 8), (70, 260, 16), (35, 130, 64), (20, 1, 1)]
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": (FP32, FP32), "bf16": (BF16, BF16), "bf16 with fp32 adapter": (BF16, FP32)}
P = (0.0, 0.1)
SCALE = 0.37


def cases() -> dict[str, tuple[Any, ...]]:
    """Name -> arguments of `results`."""
    return {
        f"{name}, n {n}, w {w}, r {r}, p {p}": (n, w, r, p, wide, narrow)
        for name, (wide, narrow) in DTYPES.items()
        for n, w, r in SHAPES
        for p in P
        if narrow == wide or r == 3
    }


def results(
    ops: LoraOps, n: int, w: int, r: int, p: float, wide: torch.dtype, narrow: torch.dtype
) -> dict[str, Tensor]:
    """Of each operation. All inputs are views as they occur: columns of a wider matrix, or transposed."""
    generator = torch.Generator().manual_seed(n + w + r)

    def drawn(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns + 5, generator=generator).to(dtype)[:, :columns]

    x, dx, A, B = drawn(n, w, wide), drawn(n, w, wide), drawn(r, w, narrow), drawn(r, w, narrow).t()
    U, low = drawn(n, r, narrow), drawn(n, r, narrow)
    keys = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32)
    mask = Mask(keys, torch.arange(40, 40 + w, dtype=torch.int32), p) if p else None
    dS, dB = ops.up_gradients(x, B, low)
    ops.add_input_gradient(dx, U, A, SCALE, mask)
    return {
        "down": ops.down(x, A, mask, SCALE),
        "U": dS,
        "dB": dB,
        "dA": ops.down_gradient(U, x, mask, SCALE),
        "dx": dx,
    }


def interpret(path: str) -> None:
    """Save {case: {"triton" and "plain": results}}."""
    kinds = {"triton": TritonLoraOps(interpret=True), "plain": LoraOps()}
    found = {name: {kind: results(ops, *case) for kind, ops in kinds.items()} for name, case in cases().items()}
    torch.save(found, path)


def compile_all() -> None:
    """Compile for an H100, with none there; print what each kernel needs of shared memory, in bytes."""
    from modellink_lora.device import lora_kernels as kernels

    flags = {"MASKED": True, "WIDEN": False}
    n, w = lora_triton.tile(BF16, 16, one_pass=False)
    compile_one(kernels.down_kernel, BF16, **flags, N=n, W=w, R=16)
    compile_one(kernels.add_kernel, BF16, **flags, N=n, W=w, R=16)
    n, w = lora_triton.tile(BF16, 16, one_pass=True)
    compile_one(kernels.pass_kernel, BF16, **flags, N=n, W=w, R=16, LOW=True)
    n, w = lora_triton.tile(FP32, 128, one_pass=False)
    compile_one(kernels.down_kernel, FP32, **flags, N=n, W=w, R=128)  # needs most
    compile_one(kernels.sum_kernel, BF16, L=32, R=16)


def compile_one(kernel: Any, dtype: torch.dtype, **constants: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    given = ("x", "dx", "factor", "right_factor", "left_factor", "U", "A", "out")
    kinds = dict.fromkeys(given, "*fp32" if dtype == FP32 else "*bf16")
    kinds |= dict.fromkeys(("sums", "low_sums", "gradient_sums"), "*fp32")
    kinds |= {"row_keys": "*i32", "column_numbers": "*i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    types = {parameter.name: kinds.get(parameter.name, "i32") for parameter in kernel.params}
    # 16 divides addresses, widths and strides of a real model
    even = [
        i for i, (name, kind) in enumerate(types.items()) if kind[0] == "*" or name in ("w", "x_stride", "dx_stride")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": lora_triton.WARPS})
    print(kernel.__name__, binary.metadata.shared)


if __name__ == "__main__":
    interpret(sys.argv[2]) if sys.argv[1] == "interpret" else compile_all()
