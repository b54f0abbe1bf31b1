"""One connection of a client: HTTP/1.1 by h11 and uvicorn, with the limits that uvicorn leaves to a proxy (`Limits`).

A client has a limited time for the headers and for the body of a request, and for reading an answer. What is not HTTP
is answered with a status of 4xx in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from modellink_lora.inference.api_error import ApiError
from modellink_lora.inference.listening import Limits

_HEADER_BYTES = 16 << 10  # request line and headers together


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The class of connections with these limits, for uvicorn's `http`."""
    return type("LimitedConnection", (_LimitedConnection,), {"limits": limits})


class _LimitedConnection(H11Protocol):
    """Whatever state a connection is in, there is one time-out at most that waits for the client.

    h11 names the states of the client: IDLE before the end of the headers, SEND_BODY before that of the body.
    """

    limits: Limits
    _answered = 0  # requests on this connection
    _waiting_for: Any = None
    _timeout: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.conn = h11.Connection(h11.SERVER, _HEADER_BYTES)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, f"{self.limits.connections} connections are open: try again later"))
        self._watch()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception:  # of h11 and uvicorn, about what the client has sent
            self.send_400_response("")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timeout, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._answered += 1
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"not an HTTP request, or one with headers of more than {_HEADER_BYTES} bytes"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch(self) -> None:
        """Start the time-out of what the client is to send next, unless it runs already."""
        seconds: dict[Any, float] = {h11.IDLE: self.limits.header_seconds, h11.SEND_BODY: self.limits.body_seconds}
        idle = self.timeout_keep_alive_task is not None  # between two requests: uvicorn's own time-out runs
        state = None if idle or self.transport.is_closing() else self.conn.their_state
        wanted = (state, self._answered) if state in seconds else None
        if wanted == self._waiting_for:
            return
        if self._timeout is not None:
            self._timeout.cancel()
        self._waiting_for = wanted
        self._timeout = self.loop.call_later(seconds[state], self._too_slow) if wanted else None

    def _too_slow(self) -> None:
        part = "headers" if self.conn.their_state is h11.IDLE else "body"
        seconds = self.limits.header_seconds if part == "headers" else self.limits.body_seconds
        self._refuse(ApiError(408, f"the {part} of the request did not arrive within {seconds:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            headers = [*error.headers(), (b"connection", b"close")]
            with contextlib.suppress(h11.LocalProtocolError):  # the answer to HEAD has no body
                self.transport.write(self.conn.send(h11.Response(status_code=error.status, headers=headers)) or b"")
                self.transport.write(self.conn.send(h11.Data(data=error.content())) or b"")
                self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application's answer has no reader any more
            self.cycle.message_event.set()
        self.transport.close()
