"""Which versions of megatron-core were tried, and the refusal of all others. docs/versions.md has what was run."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from modellink_lora.config.errors import UserError

# To try another version add it here, run `tests/versions.sh` on it, and write down in docs/versions.md what came out.
TRIED = ("0.14", "0.15", "0.16", "0.17", "0.18", "0.19")


def release(version: str | None = None) -> tuple[int, int]:
    """(0, 16) of megatron-core 0.16.1, by default of the installed one."""
    found = re.match(r"(\d+)\.(\d+)", version or installed())
    if found is None:
        raise UserError(f"megatron-core calls itself {version or installed()}, which is no version: install it anew")
    return int(found[1]), int(found[2])


@functools.cache
def installed() -> str:
    """The version that an import would find, pip's or that of a source tree on PYTHONPATH; it is not imported for it.

    Raises UserError when there is none.
    """
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:  # not even `megatron`
        found = None
    if found is None or found.origin is None:
        raise UserError(f"megatron-core is not installed: pip install 'megatron-core{_range()}'")
    text = Path(found.origin).with_name("package_info.py").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))
    return ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))


def check_version() -> None:
    """Raise UserError unless the installed minor version was tried. A refusal, because wrong training shows nothing."""
    if release() not in [release(version) for version in TRIED]:
        raise UserError(
            f"megatron-core {installed()} was not tried with this package; tried are {', '.join(TRIED)}: "
            f"pip install 'megatron-core{_range()}'"
        )


def _range() -> str:
    major, minor = release(TRIED[-1])
    return f">={TRIED[0]},<{major}.{minor + 1}"
