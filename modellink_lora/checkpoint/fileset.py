"""Several files of a folder that others write into as well, replaced together.

The step that counts is the appearance of one more file, the commit: a list of the renames that are left to do. A kill
before it leaves the old set, one after it the new set, since whoever opens the set does the renames first.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modellink_lora.checkpoint.store import LEFTOVER, beside, clear_dead, replacing_file, to_disk
from modellink_lora.config.document import read_document
from modellink_lora.config.errors import UserError


@contextlib.contextmanager
def replacing_files(commit: Path, paths: Sequence[Path]) -> Iterator[Mapping[Path, Path]]:
    """Temporary names of `paths`, whose files all take their places together when the block succeeds.

    What a dead writer of the same set left is put right first. When the block fails, the old files stay.

    Args:
        commit: the file that says which renames are to be done; in the folder of all `paths`.
    """
    commit.parent.mkdir(parents=True, exist_ok=True)
    finish_replacing(commit)
    for path in paths:
        clear_dead(path)
    temporaries = {path: beside(path, "tmp") for path in paths}
    try:
        yield temporaries
        for temporary in temporaries.values():
            to_disk(temporary)
        with replacing_file(commit) as writing:
            writing.write_text(json.dumps({temporary.name: path.name for path, temporary in temporaries.items()}))
        finish_replacing(commit)
    finally:
        if not commit.exists():
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)


def finish_replacing(commit: Path) -> None:
    """Do the renames that a killed writer left, if there are any. Several processes may do so at one time.

    Raises UserError where this folder cannot be written.
    """
    if not commit.is_file():
        return
    try:
        renames = read_document(commit, dict[str, str])
        for temporary, name in renames.items():
            match = LEFTOVER.fullmatch(temporary)
            if not match or match["name"] != name or "/" in temporary:
                raise UserError(f"{commit}: was not written by this program: remove it")
            with contextlib.suppress(FileNotFoundError):  # done already
                os.replace(commit.with_name(temporary), commit.with_name(name))
        to_disk(commit.parent)
        commit.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{commit}: a run of preprocess_data.py was killed while it renamed its files, and this folder cannot be "
            f"written to finish that ({error.strerror}): open the data once from where it can"
        ) from None
