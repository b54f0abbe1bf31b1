"""A comparison by this world's process group."""

from __future__ import annotations

from typing import Any


def compared(*, comparison: dict[str, Any], engine: dict[str, Any], parallel: dict[str, Any] | None = None) -> Any:
    """(the Comparison or the user's error, what was said) on the first process; None on the others."""
    import torch

    from modellink_lora.config.compare import CompareConfig
    from modellink_lora.config.engine import EngineConfig
    from modellink_lora.config.errors import UserError
    from modellink_lora.config.parallel import ParallelConfig
    from modellink_lora.device import get_device
    from modellink_lora.evaluation.compare import compare

    said: list[str] = []
    try:
        found = compare(
            CompareConfig(**comparison), EngineConfig(**engine), ParallelConfig(**(parallel or {})), model_flags={},
            lora_flags={}, device=get_device("cpu"), torch_device=torch.device("cpu"), say=said.append,
        )  # fmt: skip
    except UserError as error:
        return str(error), said
    return found and (found, said)
