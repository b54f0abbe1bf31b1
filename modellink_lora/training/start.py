"""Where a run begins: at iteration 0, or where its checkpoint stands; and that its save folder holds one run.

The folder is looked at before anything is written, and changed when everything else about the run has been checked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.earlier import set_aside, set_later_aside
from modellink_lora.checkpoint.store import TRACKER
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.train import TrainConfig
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.reporting.report import CURVE
from modellink_lora.reporting.run_record import RECORD, last_launchers, launcher
from modellink_lora.reporting.run_report import HTML, MARKDOWN, METRICS
from modellink_lora.training.data import RunData
from modellink_lora.training.state import Parts, Progress, resume

_LOGS = (METRICS, RECORD, CURVE, HTML, MARKDOWN)  # what a run writes beside its checkpoints


def restarted(train: TrainConfig, attempt: int) -> tuple[TrainConfig, list[str]]:
    """The flags of a job that its launcher has started again: it goes on from what it has saved itself.

    Until it has saved something it begins as its flags say. All processes call it together.

    Args:
        attempt: how often the launcher has started the job before.
    """
    if not attempt or not train.save:
        return train, []
    own: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(own, launcher())
    root = Path(train.save)
    # of another job, one that saved here before, the launcher was another process
    answer = [dist.get_rank() == 0 and (root / TRACKER).is_file() and bool(last_launchers(root) & set(own))]
    dist.broadcast_object_list(answer, src=0)
    if not answer[0]:
        return train, []
    train = dataclasses.replace(train, lora_load=train.save, finetune=False, no_load_optim=False)
    return train, [f"restarted by the launcher ({attempt}): the run goes on from what it has saved in --save {root}"]


def check_save(train: TrainConfig, adapter: Adapter | None) -> None:
    """Raise UserError when a new run would take the place of the adapter that it begins with."""
    if train.save and train.finetune and adapter and _is_in(adapter, Path(train.save)):
        raise UserError(
            f"--finetune from {adapter.folder}, which is in --save {train.save}: the new run would take its place; "
            "name another --save, or leave out --finetune to resume"
        )


def begin(
    train: TrainConfig, adapter: Adapter | None, lora: LoraConfig, parts: Parts, run_data: RunData
) -> tuple[Progress, list[str]]:
    """The progress to go on from, and what to tell about it. All processes call it together."""
    terms = functools.partial(run_data.terms, lora)
    if adapter and not train.finetune:
        progress, told = resume(adapter, parts, load_optimizer=not train.no_load_optim, terms=terms)
    else:
        progress, told = Progress(data=dict(terms().data), settings=dict(terms().settings)), []
        if adapter:
            told.append(f"--finetune: starting at iteration 0 from the weights of {adapter.folder}")
    if train.save:
        told += _clear(Path(train.save), adapter, progress, parts.context)
    return progress, told


def _clear(root: Path, adapter: Adapter | None, progress: Progress, context: ParallelContext) -> Sequence[str]:
    """Move checkpoints that are not of this run out of the way."""
    told = []
    if context.is_main and root.is_dir():
        if adapter and _is_in(adapter, root):
            if moved := set_later_aside(root, progress.iteration):
                told.append(f"warning: --save {root} holds checkpoints after iteration {progress.iteration}, where "
                            f"this run goes on: they are kept in {moved}")  # fmt: skip
        elif moved := set_aside(root, logs=_LOGS):
            told.append(f"warning: --save {root} holds another run: its checkpoints and logs are kept in {moved}; to "
                        "go on with a run, give --lora-load")  # fmt: skip
    dist.barrier()  # nobody may read a folder that is being changed
    return told


def _is_in(adapter: Adapter, root: Path) -> bool:
    return adapter.folder.resolve().parent == root.resolve()
