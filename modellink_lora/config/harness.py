"""What the lm-eval job is told besides the model; everything else is lm-eval's to read."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.flag import flag

MODEL = "modellink_lora"  # our name in lm-eval's table of models
MODEL_ARGS = ("add_bos_token", "prefix_token_id")  # of its Hugging Face backend's, those that change prompts


@dataclass(frozen=True)
class HarnessConfig:
    """lm-eval"""

    adapter: str | None = flag(
        None, "what to judge: base, tuned (the adapter of --lora-load, the default) or a name of --lora-modules"
    )
