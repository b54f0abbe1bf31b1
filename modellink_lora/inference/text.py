"""Text of an answer as its tokens come: nothing that may still change is shown, and stop texts end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder puts where the bytes of a character are not all there


class TextStream:
    """Turns token ids into text piece by piece.

    Args:
        stop: texts that end the answer; what may become one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self.text = ""  # shown so far

    def push(self, token: int) -> tuple[str, bool]:
        """What can be shown after one more token, and whether a stop text ended the answer with it."""
        self._ids.append(token)
        whole = self._decode()
        found = [at for at in (whole.find(stop, max(0, len(self.text) - len(stop))) for stop in self._stop) if at >= 0]
        if found:
            return self._show(whole[: min(found)]), True
        if whole.endswith(_UNFINISHED):
            return "", False
        held = max((_overlap(whole, stop) for stop in self._stop), default=0)
        return self._show(whole[: len(whole) - held]), False

    def end(self) -> str:
        """What was held back until now."""
        return self._show(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
