"""A sample as text in which the trained tokens can be seen."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from modellink_lora.data.encode import IGNORED, Sample

_ON_TERMINAL = ("\x1b[1;32m", "\x1b[0m")  # bold green
_ON_PIPE = ("[[", "]]")


def marked_text(sample: Sample, tokenizer: Any, *, colour: bool) -> str:
    """The sample decoded, runs of trained tokens in green, or in [[double brackets]] where there is no colour."""
    before, after = _ON_TERMINAL if colour else _ON_PIPE
    text = ""
    for trained, run in groupby(zip(sample.input_ids, sample.labels), key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        text += f"{before}{piece}{after}" if trained else piece
    return text
