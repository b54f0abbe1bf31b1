"""What comparing two checkpoints is told besides their folders."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import flag


@dataclass(frozen=True)
class DiffConfig:
    """Comparison"""

    base: str | None = flag(None, "base model of the adapters, where their own files do not tell its dimensions")
    tolerance: float = flag(0.0, "greatest difference that still counts as equal")
    lines: int = flag(20, "differing tensors to list at most; 0 lists all")

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise UserError(f"--tolerance {self.tolerance:g}: must not be negative")
        if self.lines < 0:
            raise UserError(f"--lines {self.lines}: must not be negative")
