"""What a resumed run must have in common with the run it goes on with: what is refused, told, or not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modellink_lora.config.errors import UserError


@dataclass(frozen=True)
class Terms:
    """What decides the numbers of a run, as `training.json` keeps it. A key that is not there is not known."""

    data: Mapping[str, Any]  # which samples are read, in which order, and what their loss is: must not change
    settings: Mapping[str, Any]  # what may change, and is told


@dataclass(frozen=True)
class Agreement:
    """How the terms of two runs compare where none of the data's differs."""

    changed: Mapping[str, tuple[Any, Any]]  # setting -> (before, now)
    unknown: list[str]  # what the older run did not record

    @property
    def is_whole(self) -> bool:
        """Whether everything is known to be as it was."""
        return not self.changed and not self.unknown

    def lines(self) -> list[str]:
        """What to tell the user."""
        told = []
        if self.changed:
            told.append(f"differs from the interrupted run: {_arrows(self.changed)}")
        if self.unknown:
            told.append(
                "the checkpoint was written by an older version, which did not record "
                f"{', '.join(self.unknown)}: whether they are as before was not compared"
            )
        return told


def compare(saved: Terms, now: Terms, *, where: str) -> Agreement:
    """Compare in both directions: what was given and is not, what was not given and is.

    Args:
        where: the checkpoint, for the message.
    Raises:
        UserError: samples, their order or their loss would change.
    """
    before, here = _by_epochs(saved.data), _by_epochs(now.data)
    different = _changed(before, here)
    if "data" in different:  # the others of the files follow from it
        different = {key: pair for key, pair in different.items() if key not in _OF_THE_FILES}
    if different:
        raise UserError(
            f"{where}: the samples or their order would change on resume ({_arrows(different)}); restore these, "
            "or give --finetune to start a new run from this adapter"
        )
    reduction = "loss_reduction"
    changed = _changed(saved.settings, now.settings)
    if reduction in changed:
        was, is_now = changed[reduction]
        raise UserError(
            f"{where}: the loss would become another one on resume (--loss-reduction {was} -> {is_now}); restore it, "
            "or give --finetune to start a new run from this adapter"
        )
    unknown = [key for one, other in ((here, before), (now.settings, saved.settings)) for key in one
               if key not in other and key not in _OPTIONAL]  # fmt: skip
    return Agreement(changed, unknown)


# known of data of this program only; `data`, a hash of samples of the files, is known of all
_OPTIONAL = ("prompt_type", "crc32_of_input_ids", "crc32_of_labels")
_OF_THE_FILES = (*_OPTIONAL[1:], "longest_sample")


def _by_epochs(data: Mapping[str, Any]) -> dict[str, Any]:
    """A full shuffle depends on the number of epochs that are shuffled together; without the key it is off."""
    read, of = dict(data), data.get("full_shuffle_of")
    read.pop("full_shuffle_of", None)
    count = data.get("samples")
    if isinstance(of, int) and isinstance(count, int) and count > 0:
        of = -(-of // count)
    return {**read, "full_shuffle_epochs": of}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (before[key], now[key]) for key in before if key in now and before[key] != now[key]}


def _arrows(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
