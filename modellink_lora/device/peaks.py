"""Peak matrix arithmetic of known chips, from their makers' data sheets: dense, without sparsity, at boost clock."""

from __future__ import annotations

import re

import torch

_TERA = 1e12

# Words of the chip's name -> TFLOP/s of (bf16 and fp16 with fp32 accumulation, plain fp32). The first row whose words
# the device's name has counts: "H100 PCIe" stands before "H100". 0: the maker gives no number.
_CUDA = {
    "GB200": (2500.0, 80.0), "B200": (2250.0, 75.0), "B100": (1750.0, 60.0),
    "GH200": (989.4, 66.9), "H200": (989.4, 66.9), "H100 NVL": (835.5, 60.0), "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 66.9), "H800 PCIe": (756.0, 51.0), "H800": (989.4, 66.9), "H20": (148.0, 44.0),
    "A100": (312.0, 19.5), "A800": (312.0, 19.5), "A40": (149.7, 37.4), "A30": (165.0, 10.3), "A10G": (70.0, 31.5),
    "A10": (125.0, 31.2), "L40S": (362.0, 91.6), "L40": (181.0, 90.5), "L20": (119.5, 59.8), "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6), "RTX 3090": (71.0, 35.6),
}  # fmt: skip
# Ascend910_93.. are the two dies of a 910C, each a device of its own.
_NPU = {
    "Ascend910B1": (376.0, 0.0), "Ascend910B2": (376.0, 0.0), "Ascend910B3": (313.0, 0.0), "Ascend910B4": (280.0, 0.0),
    "Ascend910_93..": (376.0, 0.0), "Ascend910A": (256.0, 0.0),
}  # fmt: skip


def cuda_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the GPU that calls itself `name`; None for one not in the table."""
    return _peak(_CUDA, name, dtype)


def npu_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the NPU that calls itself `name`; None for one not in the table."""
    return _peak(_NPU, name, dtype)


def _peak(table: dict[str, tuple[float, float]], name: str, dtype: torch.dtype) -> float | None:
    # whole words: an RTX A4000 is no A40, an H200 no H20
    row = next((peaks for words, peaks in table.items() if re.search(rf"\b{words}\b", name)), None)
    if row is None:
        return None
    return row[1 if dtype == torch.float32 else 0] * _TERA or None
