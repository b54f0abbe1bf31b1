"""The fused operators of Ascend NPUs that plain PyTorch can stand in for, and the flag that leaves them out."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.flag import flag

NPU_OPERATORS = ("npu_rms_norm", "npu_swiglu", "npu_rotary_mul", "npu_fusion_attention")


def plain_operators_flag() -> Any:
    """A field `npu_plain_operators: tuple[str, ...]`."""
    return flag(
        (),
        "on Ascend: fused operators to leave out; plain PyTorch computes the same instead",
        choices=(*NPU_OPERATORS, "all"),
    )
