"""Where tests find the real data sets and tokenizers, which are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_VARIABLE = "MODELLINK_LORA_SHARED"
_BESIDE = Path(__file__).resolve().parents[2].parent / "shared"


def shared(path: str) -> Path:
    """`path` below the folder in MODELLINK_LORA_SHARED, or below `shared` beside the repository; skips where absent."""
    if not is_there(path):
        pytest.skip(f"needs {_root() / path}; set {_VARIABLE} to the folder of the shared data")
    return _root() / path


def is_there(path: str) -> bool:
    return (_root() / path).exists()


def _root() -> Path:
    return Path(os.environ.get(_VARIABLE) or _BESIDE)
