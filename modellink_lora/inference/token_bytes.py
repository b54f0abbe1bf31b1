"""The bytes that a token stands for. A token may be a part of a character, which has no text of its own."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "▁"  # of SentencePiece


class TokenBytes(Protocol):
    """The bytes of a token id.

    Args:
        begins: whether it is the first token of a text, where SentencePiece drops the blank before a word.
    """

    def __call__(self, id: int, begins: bool, /) -> bytes: ...


def token_bytes(tokenizer: Any) -> TokenBytes:
    """The bytes of the tokens of `tokenizer`: those of an answer's tokens, put together, are its raw text.

    A byte-level vocabulary spells each byte as a character, one with byte fallback has tokens such as `<0xE2>`. Which
    of them it is stands in the decoder of a fast tokenizer; SentencePiece's own decoder always knows byte tokens.
    """
    kinds = _decoders(tokenizer)
    spelled = _spelled_bytes() if "ByteLevel" in kinds else {}
    fallback = "ByteFallback" in kinds or hasattr(tokenizer, "sp_model")
    added = {id: str(token) for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}

    def whole(id: int) -> bytes:
        piece = tokenizer.convert_ids_to_tokens(id)
        if isinstance(piece, bytes):  # tokenizers made with tiktoken
            return piece
        if not isinstance(piece, str):  # the model has more rows than the tokenizer has tokens
            return b""
        if spelled and all(character in spelled for character in piece):
            return bytes(spelled[character] for character in piece)  # a decoder does it to added tokens too
        if id in added:
            return added[id].encode()
        if fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        text = str(tokenizer.decode([id]))
        blanks = len(piece) - len(piece.lstrip(_BLANK))
        return (" " * blanks + text.lstrip(" ") if blanks else text).encode()

    def bytes_of(id: int, begins: bool) -> bytes:
        data = whole(id)
        dropped = begins and data.startswith(b" ") and str(tokenizer.decode([id])).encode() == data[1:]
        return data[1:] if dropped else data

    return bytes_of


def shown(data: bytes) -> str:
    r"""As text, in which bytes that are no characters are spelled `\xf0`."""
    return data.decode(errors="backslashreplace")


def _decoders(tokenizer: Any) -> set[str]:
    """Types of the decoder of a fast tokenizer and of its parts; empty for others."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {str(part["type"]) for part in (state, *state.get("decoders", ()))}


def _spelled_bytes() -> dict[str, int]:
    """Character to byte of byte-level vocabularies: printable ones of Latin-1 are themselves, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
