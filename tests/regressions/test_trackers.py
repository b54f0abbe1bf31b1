"""Strange content of latest_checkpointed_iteration.txt: read right, or refused in one line.

Seen in public as intelligent-machine-learning/dlrover#974: a tracker without a number ended in an error.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink_lora.checkpoint.store import read_tracker
from modellink_lora.config.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(
    ("content", "expected"), [(b"release\n", "release"), (b" 5 \r\n", 5), (b"0000007", 7), (b"\t12\n\n", 12)]
)
def test_white_space_around_is_no_matter(tmp_path: Path, content: bytes, expected: int | str) -> None:
    (tmp_path / TRACKER).write_bytes(content)
    assert read_tracker(tmp_path, flag="--load") == expected


@pytest.mark.parametrize(
    "content",
    [b"", "٥".encode(), "²".encode(), b"5\n6", b"1" + b"0" * 30, b"9" * 5000, b"-1", b"\0\0", b"\xff\xfe5", b"1.0"],
)
def test_anything_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TRACKER).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_tracker(tmp_path, flag="--load")
    assert TRACKER in str(caught.value) and len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_tracker(tmp_path, flag="--load")
