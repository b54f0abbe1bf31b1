"""What a comparison of base, unmerged adapter and merged models is told besides model and layout."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag


@dataclass(frozen=True)
class CompareConfig:
    """Comparison"""

    merged_hf: str | None = flag(None, "Hugging Face folder in which the adapter is merged (SAVE_DIR/mg2hg)")
    merged_meta: str | None = flag(None, "folder of consolidated.NN.pth and params.json in which it is merged")
    prompt: tuple[str, ...] = flag((), "prompts to answer")
    prompt_file: str | None = flag(None, "prompts: a .json list of texts, or a .txt file with one on each line")
    max_new_tokens: int = flag(64, "most tokens of an answer", at_least=1)
    save: str | None = flag(None, "folder for compare.md and compare.html")

    def __post_init__(self) -> None:
        check_ranges(self)
        if bool(self.prompt) == bool(self.prompt_file):
            raise UserError("prompts are missing or doubled: give --prompt 'text' ... or --prompt-file")
        if self.prompt_file and not self.prompt_file.endswith((".json", ".txt")):
            raise UserError(f"--prompt-file {self.prompt_file}: give a .json list of texts or a .txt file of lines")
        if not all(self.prompt):
            raise UserError("--prompt '': is empty: write something")
