"""Ids that end an answer by the files of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modellink_lora.config.document import read_document


@dataclass(frozen=True)
class _Stops:
    eos_token_id: int | list[int] | None = None


def generation_stops(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json or config.json: like transformers, the first that says so is asked.

    Raises:
        UserError: one of them is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_document(folder / name, _Stops).eos_token_id
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []
