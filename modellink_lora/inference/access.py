"""Who may use the server and the web page: the key of --api-key, as a bearer token or as a password."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any

from modellink_lora.inference.api_error import ApiError


def check_key(scope: Any, api_key: str | None) -> None:
    """Raise ApiError unless the request of this ASGI scope carries `api_key`; None asks for none.

    Programs send it as `Authorization: Bearer KEY`; browsers as the password of any user name.
    """
    if api_key is None:
        return
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1 or not hmac.compare_digest(_key_of(given[0]), api_key.encode()):
        raise ApiError(401, "the key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")


def _key_of(authorization: bytes) -> bytes:
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
