"""Which checkpoints stay: the newest few and the best; in the background as well; failures reach everybody."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import (
    TARGETS,
    adapter_tensors,
    error_of,
    fine_tune_here,
    hf_to_megatron,
    train_flags,
    write_corpus,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    write_corpus(folder / "data", samples=40)
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def tune(base: Path, save: Path, job: Any = fine_tune_here, **train: Any) -> Any:
    return run(
        job,
        world_size=2,
        train=train_flags(load=str(base), save=str(save), train_iters=6, **train),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32, "split": "80,20,0"},
        parallel={"tensor_model_parallel_size": 2},
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
    )


def kept(save: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in save.glob("iter_*"))


def test_the_newest_few_stay(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path, save_interval=1, save_total_limit=2)
    assert kept(tmp_path) == [5, 6]
    assert not list(tmp_path.glob(".*.tmp")), "nothing half removed is left"


def best_at_three(**arguments: Any) -> None:
    """A run whose validations after iterations 0 to 6 are given."""
    from modellink_lora.training.step import Totals

    given = (Totals(loss, tokens=1, micro_batches=1) for loss in (9.0, 8.0, 7.0, 1.0, 5.0, 4.0, 3.0))
    with mock.patch("modellink_lora.training.loop.validation_loss", lambda *_, **__: next(given)):
        fine_tune_here(**arguments)


def test_the_best_stays_whatever_its_age(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path, best_at_three, save_interval=2, save_best=True, save_total_limit=1, eval_iters=2,
         eval_interval=1)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: row["validation loss"] for row in rows if "validation loss" in row and row["iteration"]}
    best = min(losses, key=losses.__getitem__)
    assert best == 3, losses
    assert (tmp_path / "best_checkpointed_iteration.txt").read_text() == str(best)
    assert kept(tmp_path) == [best, 6]


def test_saving_in_the_background_saves_the_same(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "now", save_interval=2)
    tune(base, tmp_path / "later", save_interval=2, async_save=True)
    assert kept(tmp_path / "later") == [2, 4, 6]
    for iteration in kept(tmp_path / "now"):
        for name in ("adapter.safetensors", "optimizer.safetensors", "training.json"):
            place = f"iter_{iteration:07d}/{name}"
            assert (tmp_path / "now" / place).read_bytes() == (tmp_path / "later" / place).read_bytes(), place
    assert adapter_tensors(tmp_path / "later")


def slow_writer_sees_a_copy(base: str, save: str) -> None:
    """The write begins only when training is over: what it writes must be the state of the time of the save."""
    from modellink_lora.training.state import Snapshot

    begin, write = threading.Event(), Snapshot.write

    def late(self: Snapshot, folder: Path) -> None:
        if self.training["iteration"] == 2:
            begin.wait(2)  # the six steps take less
        write(self, folder)

    Snapshot.write = late  # type: ignore[method-assign]
    try:
        fine_tune_here(
            train=train_flags(load=base, save=save, train_iters=6, save_interval=2, async_save=True),
            data={"data_path": (str(Path(base).parent / "data"),), "seq_length": 32, "split": "80,20,0"},
            parallel={"tensor_model_parallel_size": 2},
            lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
        )
    finally:
        Snapshot.write = write  # type: ignore[method-assign]


def test_a_slow_background_save_holds_the_state_of_its_own_iteration(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "now", save_interval=2)
    run(slow_writer_sees_a_copy, world_size=2, base=str(base), save=str(tmp_path / "later"))
    place = "iter_0000002/optimizer.safetensors"
    assert (tmp_path / "now" / place).read_bytes() == (tmp_path / "later" / place).read_bytes()


def error_of_full_disk(**arguments: Any) -> str:
    """The disk is full when the second save is half written."""
    from modellink_lora.training.state import Snapshot

    write = Snapshot.write

    def full(self: Snapshot, folder: Path) -> None:
        write(self, folder)
        if self.training["iteration"] == 4:
            raise OSError(28, "No space left on device")

    with mock.patch.object(Snapshot, "write", full):
        return error_of(**arguments)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_that_fails_on_the_first_process_ends_all(in_background: bool, base: Path, tmp_path: Path) -> None:
    said = tune(base, tmp_path, error_of_full_disk, save_interval=2, async_save=in_background)
    assert len(said) == 2
    for line in said:
        assert "saving failed (OSError: [Errno 28] No space left on device); the newest whole checkpoint is the" in line
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert kept(tmp_path) == [2] and not list(tmp_path.glob(".*.tmp"))
