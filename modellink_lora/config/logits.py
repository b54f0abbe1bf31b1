"""What the logits job is told besides the parallel layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import MINUTES_OF_A_YEAR, check_ranges, flag
from modellink_lora.config.tokenizer import trust_remote_code_flag


@dataclass(frozen=True)
class LogitsConfig:
    """Logits"""

    load: str = flag(dataclasses.MISSING, "base checkpoint, as posttrain_gpt.py reads it")
    prompt_file: str = flag(dataclasses.MISSING, "prompts: a .json list of texts, or a .txt file with one on each line")
    output: str = flag(dataclasses.MISSING, "file to write, e.g. logits.safetensors")
    lora_load: str | None = flag(None, "adapter to run unmerged beside the base; absent means the base alone")
    prompt_type: str = flag("empty", "template put around each prompt; empty takes the text as it is")
    tokenizer_name_or_path: str | None = flag(
        None, "folder of the Hugging Face tokenizer; default the one kept with --load"
    )
    use_fast_tokenizer: bool = flag(True, "take the slow tokenizer", name="tokenizer-not-use-fast", inverted=True)
    trust_remote_code: bool = trust_remote_code_flag()
    bf16: bool = flag(False, "compute in bf16; default fp32")
    device: str = flag("auto", "where to run", choices=("auto", "cuda", "npu", "cpu"))
    distributed_timeout_minutes: int = flag(
        30, "how long a collective waits for a missing process", at_least=1, at_most=MINUTES_OF_A_YEAR
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.prompt_file.endswith((".json", ".txt")):
            raise UserError(f"--prompt-file {self.prompt_file}: give a .json list of texts or a .txt file of lines")
        if not self.output.endswith(".safetensors"):
            raise UserError(
                f"--output {self.output}: the file is written as safetensors, so end its name with .safetensors"
            )

    @property
    def dtype(self) -> str:
        """Dtype of weights and activations."""
        return "bf16" if self.bf16 else "fp32"
