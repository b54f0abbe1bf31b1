"""Text of an answer as its tokens come: nothing that may still change is shown, and stop texts end it.

A stop text is looked for in the raw text, in which special tokens are spelled, and in the visible one, in which they
are left out: `<|im_start|>user` ends an answer although `<|im_start|>` is never shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder puts where the bytes of a character are not all there


class TextStream:
    """Turns token ids into visible text piece by piece.

    Args:
        stop: texts that end the answer; what may become one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._lengths: list[tuple[int, int]] = []  # of the raw and the visible text up to each token
        self.text = ""  # shown so far

    def push(self, token: int) -> tuple[str, bool]:
        """The text that can be shown after one more token, and whether a stop text ended the answer with it."""
        raw, visible = self._after(token)
        end = self._stopped(raw, visible)
        if end is not None:
            return self._show(visible[:end]), True
        if visible.endswith(_UNFINISHED):
            return "", False
        held = max((_overlap(visible, stop) for stop in self._stop), default=0)
        held_raw = max((_overlap(raw, stop) for stop in self._stop), default=0)
        return self._show(visible[: min(len(visible) - held, self._visible_length(len(raw) - held_raw))]), False

    def end(self, last: int | None = None) -> str:
        """What was held back until now.

        Args:
            last: the token that ended the answer, which is not shown; a stop text that it completes is not either.
        """
        visible = _decode(self._tokenizer, self._ids, raw=False)
        if last is not None and self._stop:
            end = self._stopped(*self._after(last))
            visible = visible if end is None else visible[:end]
        return self._show(visible)

    def _after(self, token: int) -> tuple[str, str]:
        """Raw and visible text of all tokens with this one."""
        self._ids.append(token)
        visible = _decode(self._tokenizer, self._ids, raw=False)
        raw = _decode(self._tokenizer, self._ids, raw=True) if self._stop else visible
        self._lengths.append((len(raw), len(visible)))
        return raw, visible

    def _stopped(self, raw: str, visible: str) -> int | None:
        """Length of the visible text before the first stop text; None without one."""
        found = [self._visible_length(at) for stop in self._stop if (at := raw.find(stop)) >= 0]
        found += [at for stop in self._stop if (at := visible.find(stop)) >= 0]
        return min(found, default=None)

    def _visible_length(self, at: int) -> int:
        """Length of the visible text that the first `at` characters of the raw text are.

        Within a token it is counted from the token's end, because a decoder drops blanks at the beginning of a text
        and of a token after a special one. The lengths may shrink where the bytes of a character come together, so the
        token is looked for from the end.
        """
        numbers = range(len(self._lengths))
        n = next((n + 1 for n in reversed(numbers) if self._lengths[n][0] <= at), 0)
        before = self._lengths[n - 1][1] if n else 0
        if n == len(self._lengths):
            return before
        raw, visible = self._lengths[n]
        return max(before, visible - (raw - at))

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


def holds_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the text of `ids`, raw or visible, contains one of `stop`."""
    texts = [_decode(tokenizer, ids, raw=raw) for raw in (True, False)] if stop else []
    return any(one in text for one in stop for text in texts)


def visible_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The visible text of `ids` up to the first of `stop`."""
    if not holds_stop(tokenizer, ids, stop):
        return _decode(tokenizer, ids, raw=False)
    stream = TextStream(tokenizer, stop)
    any(stream.push(token)[1] for token in ids)  # up to the token that completes it
    return stream.text


def _decode(tokenizer: Any, ids: Sequence[int], *, raw: bool) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=not raw, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )
    return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
