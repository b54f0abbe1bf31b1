"""Which files `--input` means: of a folder the data files of the training split, of a pattern all that match."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modellink_lora.config.errors import UserError, printable

_ENDINGS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_READABLE = f"{', '.join(_ENDINGS)} files are read"
# what the datasets library writes about a data set, beside it
_ABOUT_THE_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# words of file and folder names, those that the datasets library takes for the names of splits
_TRAINING = {"train", "training"}
_HELD_OUT = {"validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation"}
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class Sources:
    """The files of one data set. Made by `find_sources`."""

    format: str  # parquet or json
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]  # beside them, but hidden, or of no format that can be read
    notes: tuple[str, ...] = ()  # what was chosen among the files that can be read, one line each


def find_sources(path: str) -> Sources:
    """The files at `path`: a file, a folder or a pattern such as `data/*.jsonl`.

    Of a folder its own files are taken, or those of the one folder below it that has any. Test and validation files,
    by their names, are left out where there are others. A pattern takes everything that it matches.

    Raises:
        UserError: nothing can be read there, or it is not clear what is meant.
    """
    given = Path(path)
    notes: list[str] = []
    if given.is_file():
        if _format_of(given) is None:
            raise UserError(f"--input {path}: cannot read {given.suffix or 'a file without ending'}; {_READABLE}")
        return Sources(_format_of(given) or "", (given,), ())
    if given.is_dir():
        candidates = sorted(given.iterdir())
        if not any(map(_is_data, candidates)) and (below := _folder_below(given)):
            candidates = sorted(below.iterdir())
            notes.append(f"{path} itself holds no file that can be read: reading {below}")
    elif given.exists():
        raise UserError(f"--input {path}: is neither a file nor a folder")
    else:
        candidates = sorted(Path(found) for found in glob.glob(path)) if glob.has_magic(path) else []
        if not candidates:
            raise UserError(f"--input {path}: no such file or folder; data sets are not downloaded, give a local path")
    # a pattern matches names with a leading dot only when it spells the dot
    files = [file for file in candidates if _is_data(file, dotted=not given.is_dir())]
    skipped = tuple(file for file in candidates if file not in files)
    if held_out := [f for f in files if _is_held_out(f.relative_to(given) if given.is_dir() else Path(f.name))]:
        if not given.is_dir():
            notes.append(f"among the files are test or validation files, by their names: {_listed(held_out)}")
        elif len(held_out) < len(files):
            files = [file for file in files if file not in held_out]
            notes.append(
                f"not read, since by their names they are test or validation files: {_listed(held_out)} "
                f"(a pattern reads all that it matches, such as '{held_out[0].parent}/*{held_out[0].suffix}')"
            )
        else:
            notes.append("all files are test or validation files by their names")
    return Sources(_one_format(files, path), tuple(files), skipped, tuple(notes))


def _one_format(files: Sequence[Path], path: str) -> str:
    if not files:
        raise UserError(f"--input {path}: holds no file that can be read; {_READABLE}")
    formats = sorted({_format_of(file) or "" for file in files})
    if len(formats) > 1:
        raise UserError(
            f"--input {path}: holds files of several formats ({_listed(files)}); choose with a pattern such "
            f"as '{path.rstrip('/')}/*.{formats[0]}'"
        )
    return formats[0]


def _folder_below(folder: Path) -> Path | None:
    """The folder below `folder`, up to two levels, that holds the data, as `data/` of a hub's data set; None if none.

    Raises:
        UserError: there are several, which then are several data sets.
    """
    found = [
        file
        for pattern in ("*/*", "*/*/*")
        for file in folder.glob(pattern)
        if _is_data(file) and not any(map(_is_hidden, file.relative_to(folder).parts))
    ]
    places = {file.parent for file in found if not _is_held_out(file.relative_to(folder))}
    places = places or {file.parent for file in found}
    if len(places) > 1:
        raise UserError(
            f"--input {folder}: holds no file that can be read itself, but {len(places)} folders below it "
            f"do: give one of them, such as {min(places)}"
        )
    return min(places, default=None)


def _format_of(file: Path) -> str | None:
    return _ENDINGS.get(file.suffix.lower())


def _is_data(file: Path, *, dotted: bool = False) -> bool:
    """Whether `file` holds records: no hidden file, and nothing that is about the data. `dotted` takes hidden ones."""
    hidden = file.name.startswith("~") or (not dotted and _is_hidden(file.name))
    return _format_of(file) is not None and not hidden and file.name not in _ABOUT_THE_DATA and file.is_file()


def _is_hidden(name: str) -> bool:
    """Hidden files and folders, lock files of office programs, and what macOS adds to archives."""
    return name.startswith((".", "~")) or name == "__MACOSX"


def _is_held_out(file: Path) -> bool:
    """Whether the name of `file`, or else of the nearest folder that says so, is that of a test or validation split."""
    for part in (file.stem, *reversed(file.parent.parts)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        if words & _TRAINING:
            return False
        if words & _HELD_OUT:
            return True
    return False


def _listed(files: Iterable[Path]) -> str:
    names = [printable(file.name) for file in files]
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
