"""Everything that turns a data set into token files: where it is, how records become conversations, what is kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import MOST_WORKERS, check_ranges, flag
from modellink_lora.config.tokenizer import split_special_tokens_flag, trust_remote_code_flag


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing"""

    input: str = flag(
        dataclasses.MISSING,
        "data set: a .parquet, .json or .jsonl file, a folder, of which the training files are read, or a pattern",
    )
    output_prefix: str = flag(
        dataclasses.MISSING, "beginning of the names written, e.g. ./data/alpaca; the folder is created"
    )
    tokenizer_name_or_path: str = flag(dataclasses.MISSING, "folder of the Hugging Face tokenizer")
    tokenizer_type: str = flag("PretrainedFromHF", "kind of tokenizer", choices=("PretrainedFromHF",))
    use_fast_tokenizer: bool = flag(
        True, "take the slow tokenizer where there is one", name="tokenizer-not-use-fast", inverted=True
    )
    trust_remote_code: bool = trust_remote_code_flag()
    split_special_tokens: bool = split_special_tokens_flag()
    handler_name: str = flag("", "how a record is read, e.g. AlpacaStyleInstructionHandler")
    prompt_type: str | None = flag(None, "prompt template, e.g. llama2")
    map_keys: dict[str, object] | None = flag(
        None, "which column holds what, where the names differ from the handler's own; an empty name means none"
    )
    seq_length: int | None = flag(None, "drop samples of this many tokens or more; default keeps all", at_least=2)
    append_eod: bool = flag(False, "end each sample with one more end-of-sequence token")
    workers: int = flag(1, "processes that tokenise", at_least=1, at_most=MOST_WORKERS)
    log_interval: int = flag(100, "documents between progress lines, where no progress bar can be drawn", at_least=1)
    preview: int = flag(0, "first print this many samples as text, trained tokens marked", at_least=0)

    def __post_init__(self) -> None:
        for value, name in ((self.input, "--input"), (self.tokenizer_name_or_path, "--tokenizer-name-or-path")):
            if not value:
                raise UserError(f"{name} is empty: give a file or folder")
        check_ranges(self)
        if not self.output_prefix or self.output_prefix.endswith(("/", "\\")):
            raise UserError(
                f"--output-prefix {self.output_prefix!r} is a folder: add the beginning of the file names, "
                f"e.g. {self.output_prefix}alpaca"
            )
