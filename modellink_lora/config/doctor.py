"""What the doctor is asked to look at."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag


@dataclass(frozen=True)
class DoctorConfig:
    """Diagnosis"""

    script: str | None = flag(None, "a training script of examples/: check its paths and layout, estimate its memory")
    save: str | None = flag(None, "folder that a run would save to: its disk and its lock; default the script's")
    device: str = flag("auto", "what to look at", choices=("auto", "cuda", "npu", "cpu"))
    operators: bool = flag(True, "do not run the device's operators", name="no-operators", inverted=True)
    json: str | None = flag(None, "write everything to this file too, for a report of an error")
    timeout_seconds: float = flag(
        60.0, "how long processes are waited for, and two of them for each other", above=0, at_most=86400
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.script == "":
            raise UserError("--script '': name a training script")
