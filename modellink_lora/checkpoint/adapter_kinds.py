"""What `--lora-load` may name: an adapter of this program, rank files with LoRA factors, torch_dist, or PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.adapter import META, Adapter, open_own
from modellink_lora.checkpoint.adapter_check import check_adapter
from modellink_lora.checkpoint.bridge_adapter import open_bridge_adapter
from modellink_lora.checkpoint.lora_rank_files import open_lora_rank_files
from modellink_lora.checkpoint.megatron_dist import dist_folder
from modellink_lora.checkpoint.peft import CONFIG, PICKLED, TENSORS
from modellink_lora.checkpoint.peft_import import open_peft
from modellink_lora.checkpoint.store import TRACKER, newest
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig


def open_adapter(
    root: Path,
    *,
    flag: str = "--lora-load",
    base: Callable[[], ModelConfig] | None = None,
    given: Mapping[str, Any] | None = None,
    replacing: bool = False,
) -> Adapter:
    """The adapter that `root` names: the newest below it, or the one in it where it is an iteration's own folder.

    Args:
        flag: the flag `root` was given by, for messages.
        base: dimensions of the model under the adapter, asked for where the adapter does not tell them itself.
        given: LoraConfig fields the user typed, for what a file may not say. They are not compared here.
        replacing: whether tensors that the adapter holds as a whole can take the place of the base's.
    Raises:
        UserError: there is no adapter, or its files are torn, mixed up, or ask for something not offered.
    """
    adapter = check_adapter(_open(root, flag=flag, base=base, given=given or {}))
    if adapter.replaced and not replacing:
        raise UserError(f"{flag} {adapter.folder}: replaces {', '.join(sorted(adapter.replaced))} as a whole "
                        "(modules_to_save): merge it into its base (convert_ckpt.py) and use the result")  # fmt: skip
    return adapter


def _open(root: Path, *, flag: str, base: Callable[[], ModelConfig] | None, given: Mapping[str, Any]) -> Adapter:
    """The adapter as its reader gives it."""
    if not root.is_dir():
        raise UserError(f"{flag} {root}: no such folder")
    peft = [name for name in (CONFIG, TENSORS, PICKLED) if (root / name).is_file()]
    if peft:
        if others := [name for name in (TRACKER, META) if (root / name).is_file()]:
            raise UserError(
                f"{flag} {root}: holds {peft[0]} of PEFT and {others[0]} as well: put them into two folders"
            )
        return open_peft(root, flag=flag, base=base)
    if dist := dist_folder(root, flag=flag):
        return open_bridge_adapter(dist, flag=flag, base=base, given=given)
    itself = re.fullmatch(r"iter_\d{7}|release", root.name) and not (root / TRACKER).is_file()
    if not itself and not (root / TRACKER).is_file() and (root / "config.json").is_file():
        raise UserError(f"{flag} {root}: is a Hugging Face model, not an adapter")
    folder = root if itself else newest(root, flag=flag)
    ranks = any(folder.glob("mp_rank_*"))
    if ranks and (folder / META).is_file():
        raise UserError(f"{flag} {folder}: holds {META} and mp_rank_* folders: put the two adapters into two folders")
    if ranks:
        return open_lora_rank_files(folder, flag=flag, base=base, given=given)
    return open_own(folder, flag=flag)
