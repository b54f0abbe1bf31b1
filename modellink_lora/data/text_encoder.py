"""From text to token ids: what users write stays text, also where it spells a special token of the tokenizer."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Ids = list[int]

_MOST_CACHED = 256
_BEFORE = ("\n", "|", "0")


@dataclass(frozen=True)
class Piece:
    """Part of a text: written by a template, whose special tokens are meant, or by a user."""

    text: str
    by_user: bool = False


@dataclass(frozen=True)
class _Control:
    """A special token: its id, and whether blanks beside it belong to it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class NotText(ValueError):
    """A text spells a special token, and this tokenizer has no way to write that as text."""


class TextEncoder:
    """Encodes texts that consist of pieces; a text that spells no special token gets the tokenizer's own ids.

    Args:
        split_special_tokens: what users write is never a special token, as transformers' argument of this name has it;
            False makes it one.
        template_text: of the template; tokens in it are control tokens too if the tokenizer cuts them out of text,
            although it does not call them special.
    """

    def __init__(self, tokenizer: Any, *, split_special_tokens: bool, template_text: str = "") -> None:
        self.tokenizer, self.split_special_tokens = tokenizer, split_special_tokens
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.eos_token: str | None = tokenizer.eos_token
        self.met: set[str] = set()  # special tokens that users' text spelled, until the caller clears it
        self._controls = _control_tokens(tokenizer, template_text)
        # rare characters become the unknown token too, so its id does not say that a text spells it
        self._unknown: str | None = tokenizer.unk_token
        self._names = {control.id: text for text, control in self._controls.items() if text != self._unknown}
        spellings = sorted(self._controls, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, spellings)) + ")" if spellings else r"(\Z.)")
        self._expected: dict[tuple[str, ...], Counter[int]] = {}
        self._starts_differ = self._is_start_marked()

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written so."""
        found: int | None = self.tokenizer.convert_tokens_to_ids(text)
        return found

    def slot(self, pieces: Sequence[Piece]) -> Ids:
        """Ids of the pieces as one text, without anything put around it. Raises NotText."""
        text = "".join(piece.text for piece in pieces)
        if not text:
            return []
        ids = self._encode(text)
        own = tuple(piece.text for piece in pieces if not piece.by_user)
        spelled = self._spelled("".join(piece.text for piece in pieces if piece.by_user), ids, self._own(own))
        if not spelled:
            return ids
        self.met |= spelled
        return self._apart(pieces) if self.split_special_tokens else ids

    def text(self, text: str) -> Ids:
        """Ids of a user's text, without anything put around it."""
        return self.slot([Piece(text, by_user=True)])

    def whole(self, text: str) -> Ids:
        """Ids of a user's text with what the tokenizer puts around texts, such as a BOS token. Raises NotText."""
        ids: Ids = self.tokenizer.encode(text)
        full, bare = self.tokenizer.encode("a"), self._encode("a")
        at = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
        around = full[:at], full[at + len(bare) :]
        spelled = self._spelled(text, ids, Counter(around[0] + around[1]))
        if not spelled:
            return ids
        self.met |= spelled
        return around[0] + self._apart([Piece(text, by_user=True)]) + around[1] if self.split_special_tokens else ids

    def spells(self, text: str) -> bool:
        """Whether `text` holds what the tokenizer takes for a special token."""
        return bool(self._spelled(text, self._encode(text), Counter()))

    def cut(self, text: str) -> list[str]:
        """`text` cut around the spellings of special tokens, which are the 2nd, 4th, ... of the list."""
        return self._pattern.split(text)

    def _encode(self, text: str, **settings: Any) -> Ids:
        ids: Ids = self.tokenizer.encode(text, add_special_tokens=False, **settings)
        return ids

    def _spelled(self, users: str, ids: Ids, own: Counter[int]) -> set[str]:
        """The special tokens in `ids` that are not the template's `own`."""
        found = Counter(filter(self._names.__contains__, ids))
        spelled = {self._names[token] for token in found - own} if found != own else set()
        return spelled | {self._unknown} if self._unknown and self._unknown in users else spelled

    def _own(self, texts: tuple[str, ...]) -> Counter[int]:
        if texts not in self._expected:
            if len(self._expected) >= _MOST_CACHED:
                self._expected.clear()
            ids = [token for text in texts if text for token in self._encode(text)]
            self._expected[texts] = Counter(filter(self._names.__contains__, ids))
        return self._expected[texts]

    def _apart(self, pieces: Sequence[Piece]) -> Ids:
        """The special tokens of the template by their ids, and the text between them as nothing but text."""
        parts: list[str | _Control] = [""]
        for piece in pieces:
            for n, part in enumerate([piece.text] if piece.by_user else self.cut(piece.text)):
                if n % 2:
                    parts += [self._controls[part], ""]
                else:
                    parts[-1] = f"{parts[-1]}{part}"
        ids: Ids = []
        for n, found in enumerate(parts):
            if isinstance(found, _Control):
                ids.append(found.id)
                continue
            before, after = (parts[n - 1] if n else None), (parts[n + 1] if n + 1 < len(parts) else None)
            if isinstance(before, _Control) and before.rstrip:
                found = found.lstrip()
            if isinstance(after, _Control) and after.lstrip:
                found = found.rstrip()
            ids += self._only_text(found, first=not ids)
        return ids

    def _only_text(self, text: str, *, first: bool) -> Ids:
        if not text:
            return []
        ids = self._split(text, first=first)
        if not self._spelled("", ids, Counter()):
            return ids
        # not flagged special, or a class of a publisher that does not know the argument: cut inside each spelling
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        ids = [token for n, part in enumerate(parts) if part for token in self._split(part, first=first and not n)]
        if left := self._spelled("", ids, Counter()):
            raise NotText(f"text spells the special token {', '.join(sorted(left))}, which this tokenizer cannot write "
                          "as text")  # fmt: skip
        return ids

    def _split(self, text: str, *, first: bool) -> Ids:
        if not first and self._starts_differ:
            for before in _BEFORE:  # one that does not join the text's first letters
                start, ids = self._encode(before), self._encode(before + text, split_special_tokens=True)
                if ids[: len(start)] == start:
                    return ids[len(start) :]
        return self._encode(text, split_special_tokens=True)

    def _is_start_marked(self) -> bool:
        """Whether text behind a special token is encoded in another way than text at the start."""
        end = self._controls.get(self.eos_token or "")
        return end is not None and self._encode(f"{self.eos_token}a") != [end.id, *self._encode("a")]


def _control_tokens(tokenizer: Any, template_text: str) -> dict[str, _Control]:
    """What the tokenizer cuts out of texts as one token, and users are not to write, by its spelling."""
    found: dict[str, _Control] = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special or (token.content in template_text and not token.content.isspace()):
            found[token.content] = _Control(index, token.lstrip, token.rstrip)
    known: Iterable[str] = tokenizer.all_special_tokens
    more = getattr(tokenizer, "special_tokens", None)  # of the tokenizers that publishers build on tiktoken
    if isinstance(more, Mapping):
        known = [*known, *(text for text in more if isinstance(text, str))]
    for text in known:
        index = tokenizer.convert_tokens_to_ids(text)
        if text and isinstance(index, int):
            found.setdefault(text, _Control(index))
    return found
