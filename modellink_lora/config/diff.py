"""What comparing two checkpoints is told besides their folders."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.flag import check_ranges, flag


@dataclass(frozen=True)
class DiffConfig:
    """Comparison"""

    base: str | None = flag(None, "base model of the adapters, where their own files do not tell its dimensions")
    tolerance: float = flag(0.0, "greatest difference that still counts as equal", at_least=0)
    lines: int = flag(20, "differing tensors to list at most; 0 lists all", at_least=0)

    def __post_init__(self) -> None:
        check_ranges(self)
