"""Errors of the HTTP server in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with a status of 4xx or 5xx.

    Args:
        param: the field of the request that is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def content(self) -> bytes:
        """The body as JSON in ASCII: field names of a request may hold lone surrogates, which UTF-8 cannot write."""
        return json.dumps(self.body()).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        asks = [(b"www-authenticate", b'Basic realm="modellink_lora"')] if self.status == 401 else []
        return [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.content())), *asks]

    async def send(self, send: Any) -> None:
        """Answer an ASGI request."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers()})
        await send({"type": "http.response.body", "body": self.content()})
