"""What an evaluation has done so far, on disk: a killed run goes on where it stopped, under the same settings only.

Each replica of the model appends to a file of its own, `items.rankN.jsonl`; at the end the first one joins them in
`items.jsonl`. `settings.json` says what they were made with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import read_document, read_text, to_json
from modellink_lora.config.errors import UserError

SETTINGS, ITEMS = "settings.json", "items.jsonl"
Record = dict[str, Any]
Key = tuple[str, int]


def key_of(record: Record) -> Key:
    return record["subject"], record["number"]


def digest(settings: Mapping[str, Any]) -> str:
    """Short name of a set of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Progress:
    """The finished items in `folder`, and the file that this replica appends to."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, replica: int = 0, replicas: int = 1, overwrite: bool = False
    ) -> None:
        """Raises UserError when the folder holds an evaluation with other settings, unless it is to be overwritten."""
        self.folder = folder
        self.done: dict[Key, Record] = {}
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"items.rank{replica}.jsonl"
        if overwrite:
            # other replicas remove their own; nothing is read, so none can see what another one is about to remove
            own.unlink(missing_ok=True)
            if replica == 0:
                own_names = {f"items.rank{rank}.jsonl" for rank in range(replicas)}
                for old in (folder / ITEMS, *folder.glob("items.rank*.jsonl")):
                    if old.name not in own_names:
                        old.unlink(missing_ok=True)
        else:
            _compare(folder / SETTINGS, settings)
            _mend(own)
            for file in (folder / ITEMS, *sorted(folder.glob("items.rank*.jsonl"))):
                self.done |= {key_of(record): record for record in _read(file)}
        if replica == 0:
            with replacing_file(folder / SETTINGS) as temporary:
                temporary.write_text(to_json(settings, indent=1) + "\n", encoding="utf-8")
        self._file = open(own, "a", encoding="utf-8")  # noqa: SIM115 - closed by join or with the process

    def add(self, records: Sequence[Record]) -> None:
        """Keep finished items; they survive this process from now on."""
        for record in records:
            self._file.write(to_json(record) + "\n")
            self.done[key_of(record)] = record
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def join(self, records: Sequence[Record]) -> None:
        """Write all items in one file, when every replica has ended."""
        with replacing_file(self.folder / ITEMS) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(to_json(record) + "\n" for record in records)
        for part in self.folder.glob("items.rank*.jsonl"):
            part.unlink()


def _compare(file: Path, settings: Mapping[str, Any]) -> None:
    if not file.is_file():
        return
    found = read_document(file, dict[str, Any])
    wanted = json.loads(json.dumps(settings))
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    if differing:
        what = ", ".join(f"{key} ({_short(found.get(key))}, now {_short(wanted.get(key))})" for key in differing[:4])
        raise UserError(
            f"{file.parent}: holds an evaluation with other settings: {what}{', ...' if len(differing) > 4 else ''}; "
            "choose another --save, or give --overwrite"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _mend(file: Path) -> None:
    """Cut off a last line that was being written when the process died."""
    with contextlib.suppress(FileNotFoundError), file.open("r+b") as source:
        source.truncate(source.read().rfind(b"\n") + 1)


def _read(file: Path) -> list[Record]:
    records = []
    lines = read_text(file).split("\n") if file.is_file() else [""]
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line end stands nothing, or a torn line
        try:
            record = json.loads(line)
            hash(key_of(record))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file} line {number}: is damaged; give --overwrite to evaluate afresh") from None
        records.append(record)
    return records


_WEIGHTS = (".safetensors", ".pt", ".bin", ".pth", ".distcp", ".gguf")
_FACTS = ("latest_checkpointed_iteration.txt", "adapter_config.json", "config.json")


def fingerprint(path: str | None) -> str | None:
    """Of a checkpoint's folder: names, sizes and times of its weights, to notice that it has been written anew."""
    if path is None:
        return None
    place = Path(path)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if _counts(p))
    facts = [(str(p.relative_to(place)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _counts(path: Path) -> bool:
    return (path.suffix in _WEIGHTS or path.name in _FACTS) and path.is_file()
