"""fp8 is off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class FP8GlobalStateManager:
    """What megatron-core asks."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = False, **_: Any) -> Iterator[None]:
    assert not enabled, "the double has no fp8"
    yield
