"""A web application served from a thread of its own, while the main thread computes."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from modellink_lora.config.errors import UserError

SPARE_CONNECTIONS = 256  # beside those of --max-waiting requests: for models, health and what is turned away
_LAST_WORDS_SECONDS = 1.0  # for answers on their way when the engine has ended; open pages are not waited for
_START_SECONDS = 30.0


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow is loaded. Raises UserError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; choose another port, or 0 for a free one") from None


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Args:
        header_seconds: from the first wait for a request to the end of its headers.
        body_seconds: from there to the end of its body.
        read_seconds: that a client may leave an answer unread which no longer fits the buffers.
        connections: open at a time; more are answered with status 503.
    """

    header_seconds: float = 10.0
    body_seconds: float = 60.0
    read_seconds: float = 60.0
    connections: int = 512


class Listening:
    """Serves `application` on `listener` inside the block; close() stops taking connections."""

    def __init__(self, application: Any, listener: socket.socket, limits: Limits) -> None:
        import uvicorn

        from modellink_lora.inference.connection import protocol

        # uvicorn would log a traceback for each connection that the end cuts off; the applications report their errors
        config = uvicorn.Config(
            application, http=protocol(limits), ws="none", log_level="critical", access_log=False,
            lifespan="on", proxy_headers=False, server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )

    def __enter__(self) -> Listening:
        self._thread.start()
        limit = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > limit:
                raise RuntimeError("the web server has not started")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._thread.join(_LAST_WORDS_SECONDS)
        self._server.force_exit = True
        self._thread.join(_LAST_WORDS_SECONDS)

    def close(self) -> None:
        self._server.should_exit = True
