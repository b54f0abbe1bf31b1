"""The flag that allows the Python code of a tokenizer's publisher to run."""

from __future__ import annotations

from typing import Any

from modellink_lora.config.flag import flag


def trust_remote_code_flag() -> Any:
    """A field `trust_remote_code: bool`."""
    return flag(
        False,
        "run the Python files that the tokenizer's folder names in auto_map, which Baichuan, ChatGLM, InternLM, Index "
        "MiniCPM and Qwen 1 need; without it such a folder is refused, and nothing asks",
    )
