"""What of gradio is reachable: the page and its questions and answers, for those who have the key.

gradio brings routes for uploads, for files of this machine and of other ones, and more with each release; the page uses
none of them.
"""

from __future__ import annotations

from typing import Any

from modellink_lora.inference.access import check_key
from modellink_lora.inference.api_error import ApiError

_API = "/gradio_api"
_READ = {
    "", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", f"{_API}/theme.css", f"{_API}/info",
    f"{_API}/app_id", f"{_API}/startup-events", f"{_API}/queue/data", f"{_API}/queue/status",
}  # fmt: skip
_READ_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/")
_WRITE = {f"{_API}/queue/join", f"{_API}/cancel", f"{_API}/reset"}
# gradio's pages bring all they need; a browser that reads this asks nobody else, whatever a model has written
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


def guarded(application: Any, *, api_key: str | None, max_request_bytes: int) -> Any:
    """The ASGI `application` of gradio behind the key and without the routes that the page does not use."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
            await send(message)

        if scope["type"] != "lifespan":
            try:
                check_key(scope, api_key)
                _check_route(scope)
                _check_length(scope, max_request_bytes)
            except ApiError as error:
                await error.send(sending)
                return
        await application(scope, receive, sending)

    return answer


def _check_route(scope: Any) -> None:
    path, method = scope["path"].rstrip("/"), scope.get("method")
    below = path.startswith(_READ_BELOW) and ".." not in path.split("/")
    if not ((path in _READ or below) if method in ("GET", "HEAD") else method == "POST" and path in _WRITE):
        raise ApiError(404, "no part of this page")


def _check_length(scope: Any, most: int) -> None:
    """gradio reads whole bodies into memory."""
    if scope["method"] != "POST":
        return
    length = dict(scope["headers"]).get(b"content-length")
    if length is None:
        raise ApiError(411, "the request must say its Content-Length")
    if int(length) > most:
        raise ApiError(413, f"the request is longer than {most} bytes: shorten it (--max-request-bytes)")
