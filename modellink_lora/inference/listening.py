"""A web application served from a thread of its own, while the main thread computes."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any

from modellink_lora.config.errors import UserError

_GRACE_SECONDS = 6  # for connections that are still open when the application ends


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


class Listening:
    """Serves `application` on `listener` inside the block; close() stops taking connections."""

    def __init__(self, application: Any, listener: socket.socket) -> None:
        import uvicorn

        config = uvicorn.Config(
            application, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=_GRACE_SECONDS
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._thread.join(_GRACE_SECONDS + 2)

    def close(self) -> None:
        self._server.should_exit = True
