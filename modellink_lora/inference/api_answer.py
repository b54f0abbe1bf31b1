"""Tokens of the engine in the shapes of OpenAI's answers, whole or as they come."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from modellink_lora.inference.api_request import Asked
from modellink_lora.inference.request import Token
from modellink_lora.inference.token_bytes import TokenBytes, shown


class Writer:
    """The answer to one HTTP request; choices are numbered as its requests are.

    Args:
        bytes_of: the bytes that a token of an answer stands for.
    """

    def __init__(self, asked: Asked, bytes_of: TokenBytes) -> None:
        self._asked, self._bytes_of = asked, bytes_of
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._tokens: list[list[Token]] = [[] for _ in asked.requests]

    def add(self, index: int, token: Token) -> None:
        self._tokens[index].append(token)

    @property
    def completion_tokens(self) -> int:
        return sum(len(_inside(tokens)) for tokens in self._tokens)

    def usage(self) -> dict[str, int]:
        prompt, completion = self._asked.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, tokens in enumerate(self._tokens):
            text = "".join(token.text for token in tokens)
            said = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
            finish = tokens[-1].finish if tokens else None
            choices.append(self._choice(index, said, self._logprobs(_inside(tokens), 0, first=True), finish))
        return {**self._head("chat.completion" if self._asked.chat else "text_completion"), "choices": choices,
                "usage": self.usage()}  # fmt: skip

    def opening(self) -> list[dict[str, Any]]:
        """What a streamed chat begins with: the role of each choice."""
        if not self._asked.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(n, said, None, None)]) for n in range(len(self._tokens))]

    def piece(self, index: int, token: Token) -> list[dict[str, Any]]:
        """The streamed objects for one more token."""
        offset, first = sum(len(before.text) for before in self._tokens[index]), not self._tokens[index]
        self.add(index, token)
        said = {"delta": {"content": token.text}} if self._asked.chat else {"text": token.text}
        logprobs = self._logprobs(_inside([token]), offset, first=first)
        if not self._asked.chat:
            if not (token.text or logprobs or token.finish):
                return []
            return [self._chunk([self._choice(index, said, logprobs, token.finish)])]
        chunks = []
        if token.text or (logprobs and logprobs["content"]):
            chunks.append(self._chunk([self._choice(index, said, logprobs, None)]))
        if token.finish:
            chunks.append(self._chunk([self._choice(index, {"delta": {}}, None, token.finish)]))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """What follows the last token: the counts, for those who asked for them."""
        if not self._asked.include_usage:
            return []
        return [{**self._chunk([]), "usage": self.usage()}]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._asked.include_usage else {}
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        return {**self._head(kind), "choices": choices, **usage}

    def _choice(self, index: int, said: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token], offset: int, *, first: bool) -> dict[str, Any] | None:
        """Log-probabilities of `tokens`, of which the first begins the answer if `first`."""
        if self._asked.top is None:
            return None
        begins = [first and number == 0 for number in range(len(tokens))]
        if self._asked.chat:
            return {"content": [self._chat_logprob(token, begin) for token, begin in zip(tokens, begins)]}
        offsets, names = [], [self._names(token, begin) for token, begin in zip(tokens, begins)]
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [name[token.id] for token, name in zip(tokens, names)],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{n[id]: _finite(value) for id, value in token.top} for token, n in zip(tokens, names)],
            "text_offset": offsets,
        }

    def _names(self, token: Token, begins: bool) -> dict[int, str]:
        """A text of its own for the chosen and each of the most likely tokens, which are the keys of an object."""
        names: dict[int, str] = {}
        for id in dict.fromkeys((token.id, *(id for id, _ in token.top))):
            data = self._bytes_of(id, begins)
            # as OpenAI writes tokens that are parts of characters; tokens with equal bytes need their number
            name = data.decode() if _is_text(data) else f"bytes:{shown(data)}"
            names[id] = f"token_id:{id}" if name in names.values() else name
        return names

    def _chat_logprob(self, token: Token, begins: bool) -> dict[str, Any]:
        top = [self._likely(id, value, begins) for id, value in token.top]
        return {**self._likely(token.id, token.logprob, begins), "top_logprobs": top}

    def _likely(self, id: int, logprob: float, begins: bool) -> dict[str, Any]:
        data = self._bytes_of(id, begins)
        return {"token": shown(data), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token without a chance."""
    return logprob if math.isfinite(logprob) else -9999.0


def _inside(tokens: Sequence[Token]) -> Sequence[Token]:
    """Without a stop token, which is no part of the answer."""
    return [token for token in tokens if token.counted]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
