"""Checkpoints of another run in a save folder: moved as they are into `earlier-N/`, so that two runs are not mixed up.

`earlier-N` is itself a save folder. The tracker is moved last: where a kill leaves the move half done, the next run
goes on with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from modellink_lora.checkpoint.store import TRACKER, to_disk, write_tracker
from modellink_lora.config.document import read_text

_CHECKPOINT = re.compile(r"iter_(?P<iteration>\d{7,})|release")


def set_aside(root: Path, *, logs: Sequence[str]) -> Path | None:
    """Move every checkpoint of `root`, with the trackers and the files named in `logs`; where to, if there was one."""
    checkpoints = [path.name for path in root.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    if not checkpoints and not (root / TRACKER).exists():
        return None
    others = [path.name for path in _trackers(root)] + [name for name in logs if (root / name).exists()]
    return _move(root, [*checkpoints, *others, TRACKER])


def set_later_aside(root: Path, iteration: int) -> Path | None:
    """Move the checkpoints of `root` after `iteration`, from which a run goes on; where to, if there was one."""
    found = [match for path in root.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    later = [match for match in found if int(match["iteration"] or 0) > iteration]
    if not later:
        return None
    write_tracker(root, iteration)
    trackers = [path.name for path in _trackers(root) if _number(path) > iteration]
    target = _move(root, [*(match[0] for match in later), *trackers])
    write_tracker(target, max(int(match["iteration"]) for match in later))
    return target


def _trackers(root: Path) -> list[Path]:
    """Files that name a checkpoint for another reason than that it is the newest."""
    return [path for path in root.glob("*_checkpointed_iteration.txt") if path.name != TRACKER]


def _number(tracker: Path) -> int:
    text = read_text(tracker).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _move(root: Path, names: Sequence[str]) -> Path:
    number = 1
    while _is_taken(target := root / f"earlier-{number}", names):
        number += 1
    target.mkdir(exist_ok=True)
    for name in names:
        if (root / name).exists():
            os.replace(root / name, target / name)
    to_disk(target)
    to_disk(root)
    return target


def _is_taken(folder: Path, names: Sequence[str]) -> bool:
    return (folder / TRACKER).exists() or any((folder / name).exists() for name in names)
