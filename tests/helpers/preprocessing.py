"""Preprocessing in this process: what it counted, and what it said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.preprocess import Summary, run


def preprocess(source: Path, tokenizer: str, handler: str = "Alpaca", **fields: Any) -> tuple[Summary, str]:
    """Tokenise `source` into out/a beside it, with the template `empty` unless `fields` name another."""
    said: list[str] = []
    config = PreprocessConfig(
        input=str(source),
        output_prefix=str(source.parent / "out/a"),
        tokenizer_name_or_path=tokenizer,
        handler_name=f"{handler}StyleInstructionHandler",
        **{"prompt_type": "empty", **fields},
    )
    return run(config, say=said.append), "\n".join(said)
