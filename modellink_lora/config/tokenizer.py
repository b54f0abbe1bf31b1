"""Flags of all jobs that turn text into tokens."""

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


def split_special_tokens_flag() -> Any:
    """A field `split_special_tokens: bool`."""
    return flag(
        True,
        "text of data and prompts that spells a special token, such as </s> or <|im_start|>, becomes that token; by "
        "default it stays text, and only templates write special tokens",
        name="no-split-special-tokens",
        inverted=True,
    )
