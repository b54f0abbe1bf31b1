"""Everything that turns a data set into token files: where it is, how records become conversations, what is kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import flag


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing"""

    input: str = flag(dataclasses.MISSING, "data set: a .parquet, .json or .jsonl file, a folder of them, or a pattern")
    output_prefix: str = flag(
        dataclasses.MISSING, "beginning of the names written, e.g. ./data/alpaca; the folder is created"
    )
    tokenizer_name_or_path: str = flag(dataclasses.MISSING, "folder of the Hugging Face tokenizer")
    tokenizer_type: str = flag("PretrainedFromHF", "kind of tokenizer", choices=("PretrainedFromHF",))
    use_fast_tokenizer: bool = flag(
        True, "take the slow tokenizer where there is one", name="tokenizer-not-use-fast", inverted=True
    )
    handler_name: str = flag("", "how a record is read, e.g. AlpacaStyleInstructionHandler")
    prompt_type: str | None = flag(None, "prompt template, e.g. llama2")
    map_keys: dict[str, object] | None = flag(
        None, "which column holds what, where the names differ from the handler's own; an empty name means none"
    )
    seq_length: int | None = flag(None, "drop samples of this many tokens or more; default keeps all")
    append_eod: bool = flag(False, "end each sample with one more end-of-sequence token")
    workers: int = flag(1, "processes that tokenise")
    log_interval: int = flag(100, "documents between progress lines, where no progress bar can be drawn")
    preview: int = flag(0, "first print this many samples as text, trained tokens marked")

    def __post_init__(self) -> None:
        if not self.output_prefix or self.output_prefix.endswith(("/", "\\")):
            raise UserError(
                f"--output-prefix {self.output_prefix!r} is a folder: add the beginning of the file names, "
                f"e.g. {self.output_prefix}alpaca"
            )
        for value, low, name in (
            (self.workers, 1, "--workers"),
            (self.log_interval, 1, "--log-interval"),
            (self.preview, 0, "--preview"),
        ):
            if value < low:
                raise UserError(f"{name} {value}: must be at least {low}")
        if self.seq_length is not None and self.seq_length < 2:
            raise UserError(f"--seq-length {self.seq_length}: must be at least 2")
