"""Resuming: what was changed between the two runs is refused or told, in both directions, and the rest is exact.

Found by hand and by fuzzing: a full shuffle that was given before and forgotten on resume went unnoticed; another batch
ended in an AssertionError in mid-run; AdamW's step count went on after --no-load-optim; a sample without a trained
token ended a run, at the same place each time it was resumed; a job that torchrun restarted began again at iteration 0;
and checkpoints of an earlier run stayed among those of a new one. Reported of other programs: the order of epoch 0 is
replayed in a later one (modelscope/ms-swift#10050), later epochs skip and repeat samples after a resume in mid-epoch
(NVIDIA-NeMo/Megatron-Bridge#4601); restoring by consumed samples lets the batch change (allenai/OLMo#182).
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from modellink_lora.checkpoint.adapter_kinds import open_adapter
from modellink_lora.checkpoint.earlier import set_aside, set_later_aside
from modellink_lora.checkpoint.store import TRACKER, read_tracker, write_tracker
from modellink_lora.config.errors import UserError
from modellink_lora.training.agreement import Terms, compare
from tests.helpers.fleet import PRODUCT, flags, make_source, saved
from tests.helpers.jobs import TORCHRUN, Job, kill
from tests.helpers.small_adapter import resume_lines, write_checkpoint
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import adapter_tensors, fine_tune_here, hf_to_megatron, losses, train_flags, write_corpus

SAMPLES = 12
DATA = {"data": "6b6e", "samples": 10, "seed": 1, "shuffle": True, "longest_sample": 24, "full_shuffle_of": None}
SETTINGS = {"loss_reduction": "token", "batch_size": 4, "clip_grad": 1.0, "lora_dropout": 0.0}


@pytest.mark.parametrize("before", [False, True], ids=["now", "before"])
@pytest.mark.parametrize(
    "key, value",
    [("data", "ffff"), ("samples", 9), ("seed", 2), ("shuffle", False), ("longest_sample", 8), ("full_shuffle_of", 40),
     ("prompt_type", "alpaca"), ("crc32_of_labels", 7)],
)  # fmt: skip
def test_other_samples_or_another_order_is_refused_in_both_directions(key: str, value: Any, before: bool) -> None:
    usual = {**DATA, "prompt_type": "qwen", "crc32_of_labels": 5}
    pair = [Terms(usual, SETTINGS), Terms({**usual, key: value}, SETTINGS)]
    with pytest.raises(UserError, match=r"--lora-load x: the samples or their order would change on resume \(\w+ "):
        compare(*(reversed(pair) if before else pair), where="--lora-load x")
    with pytest.raises(UserError, match=r"loss would become another one .*--loss-reduction token -> micro"):
        compare(pair[0], Terms(usual, {**SETTINGS, "loss_reduction": "micro-batch"}), where="--lora-load x")


def test_a_full_shuffle_is_compared_by_its_epochs() -> None:
    def agree(before: int | None, now: int | None, drop: bool = False) -> bool:
        saved = {key: value for key, value in DATA.items() if key != "full_shuffle_of" or not drop}
        saved |= {} if drop else {"full_shuffle_of": before}
        try:
            return compare(Terms(saved, SETTINGS), Terms({**DATA, "full_shuffle_of": now}, SETTINGS), where="").is_whole
        except UserError as error:
            assert "full_shuffle_epochs" in str(error)
            return False

    assert agree(31, 40) and agree(None, None) and agree(None, None, drop=True)  # older versions left the key out
    assert not agree(30, 40) and not agree(None, 40) and not agree(40, None) and not agree(None, 40, drop=True)


def test_what_may_change_is_told_and_what_was_not_recorded_is_named() -> None:
    changed = compare(Terms(DATA, SETTINGS), Terms(DATA, {**SETTINGS, "batch_size": 2, "clip_grad": 0.5}), where="")
    assert changed.lines() == ["differs from the interrupted run: batch_size 4 -> 2, clip_grad 1.0 -> 0.5"]
    older = compare(Terms({**DATA, "more": 3}, {"batch_size": 4}), Terms(DATA, SETTINGS), where="")
    assert not older.changed and "did not record loss_reduction, clip_grad, lora_dropout:" in older.lines()[0]
    same = compare(Terms(DATA, SETTINGS), Terms({**DATA, "prompt_type": "qwen"}, SETTINGS), where="")
    assert same.is_whole and not same.lines() and not changed.is_whole and not older.is_whole


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    write_corpus(folder / "data", samples=SAMPLES)
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def told(arguments: dict[str, Any]) -> tuple[list[str], list[int]]:
    """What the run says, an error last, and the samples it reads, in order."""
    from modellink_lora.data.sft_dataset import SftDataset
    from modellink_lora.reporting import report

    lines: list[str] = []
    read: list[int] = []
    get = SftDataset.__getitem__

    def noted(self: Any, index: int) -> Any:
        read.append(index)
        return get(self, index)

    with (
        mock.patch.object(report.Reporter, "say", lambda _, text: lines.append(text)),
        mock.patch.object(SftDataset, "trains", lambda self: True),
        mock.patch.object(report, "draw_losses"),
        mock.patch.object(report, "write_reports"),
        mock.patch.object(SftDataset, "__getitem__", noted),
    ):
        try:
            fine_tune_here(**arguments)
        except UserError as error:
            lines.append(f"error: {error}")
    return lines, read


def tune(
    base: Path, save: Path, *, world: int = 1, data: dict[str, Any] | None = None, attempt: int = 0, **train: Any
) -> tuple[list[str], list[int]]:
    """A short run; one that resumes takes the adapter's settings from the checkpoint."""
    lora = {} if "lora_load" in train else {"r": 2, "alpha": 4.0, "target_modules": ("linear_qkv",)}
    answers = run(told, world_size=world, arguments={
        "train": train_flags(**{"load": str(base), "save": str(save), "train_iters": 6, "lr": 1e-2, "min_lr": 0.0,
                                "lr_decay_style": "linear", **train}),
        "data": {"data_path": (str(base.parent / "data"),), "seq_length": 32, **(data or {})},
        "parallel": {}, "lora": lora, "attempt": attempt,
    })  # fmt: skip
    return answers[0]


def rates(save: Path) -> list[float]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row["learning rate"] for row in rows if "lm loss" in row]


def record(save: Path, iteration: int) -> dict[str, Any]:
    path = save / f"iter_{iteration:07d}/training.json"
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after 2 of 6 steps of 4 samples; `samples` holds the ones it read."""
    save = tmp_path_factory.mktemp("first") / "run"
    _, read = tune(base, save, exit_interval=2)
    (save.parent / "samples").write_text(json.dumps(read))
    return save


@pytest.mark.parametrize("batch", [3, 8])
def test_another_batch_goes_on_by_consumed_samples(batch: int, base: Path, first: Path, tmp_path: Path) -> None:
    """Each sample comes once an epoch, also where the end of an epoch is none of a batch; the decay ends at the end."""
    before = json.loads((first.parent / "samples").read_text())
    lines, read = tune(base, tmp_path / "whole", lora_load=str(first), global_batch_size=batch)
    assert any("batch_size 4 -> " in line for line in lines) and any("lr_decay_steps 24 -> " in line for line in lines)
    assert not any("equal to rounding" in line or line.startswith("error") for line in lines)
    samples = before + read
    assert len(read) == 4 * batch
    for start in range(0, len(samples) - SAMPLES + 1, SAMPLES):
        assert sorted(samples[start : start + SAMPLES]) == list(range(SAMPLES))
    assert rates(first)[-1] > rates(tmp_path / "whole")[0] > rates(tmp_path / "whole")[-1] == 0

    parts = tmp_path / "parts"  # the same, interrupted once more: now nothing differs
    tune(base, parts, lora_load=str(first), global_batch_size=batch, exit_interval=4)
    lines, _ = tune(base, parts, lora_load=str(parts), global_batch_size=batch)
    assert not any("differs" in line for line in lines)
    assert losses(parts) == losses(tmp_path / "whole") and rates(parts) == rates(tmp_path / "whole")
    assert record(parts, 6) == record(tmp_path / "whole", 6)


def test_a_checkpoint_of_an_older_version_is_resumed(base: Path, first: Path, tmp_path: Path) -> None:
    whole, older = tmp_path / "whole", tmp_path / "older"
    for save in (whole, older):
        shutil.copytree(first, save)
    path = older / "iter_0000002/training.json"
    document = json.loads(path.read_text())
    for key in ("settings", "crc32"):
        del document[key]
    document["data"] = {key: document["data"][key] for key in ("data", "samples", "seed", "shuffle")}
    path.write_text(json.dumps(document))
    tune(base, whole, lora_load=str(whole))
    lines, _ = tune(base, older, lora_load=str(older))
    (line,) = [line for line in lines if "older version" in line]
    assert "did not record longest_sample, loss_reduction, micro_batch_size," in line and "batch_size," not in line[:90]
    assert losses(older) == losses(whole) and record(older, 6) == record(whole, 6)
    lines, read = tune(base, tmp_path / "full", lora_load=str(first), data={"full_shuffle_instruction_dataset": True})
    assert "full_shuffle_epochs None -> 2" in lines[-1] and not read


def test_equal_to_rounding_is_said_where_it_is_true_only(tmp_path: Path) -> None:
    adapter = open_adapter(write_checkpoint(tmp_path))

    def said(**changes: Any) -> str:
        (line,) = [line for line in resume_lines(adapter, data_parallel=2, **changes) if "another layout" in line]
        return line

    assert said().endswith("the run continues, equal to rounding")
    for change in ({"settings": {"batch_size": 2}}, {"settings": {"clip_grad": 0.5}}, {"schedule": {"max_lr": 2e-3}},
                   {"load_optimizer": False}):  # fmt: skip
        assert "equal" not in said(**change)
    assert not [line for line in resume_lines(adapter, data_parallel=1) if "layout" in line]


def test_after_no_load_optim_the_updates_are_counted_from_zero(base: Path, first: Path, tmp_path: Path) -> None:
    fresh = {"lora_load": str(first), "no_load_optim": True}
    (first / "iter_0000002/optimizer.safetensors").rename(tmp_path / "aside")  # which is not needed
    try:
        tune(base, tmp_path / "whole", **fresh)
        tune(base, tmp_path / "parts", exit_interval=4, **fresh)
    finally:
        (tmp_path / "aside").rename(first / "iter_0000002/optimizer.safetensors")
    assert record(tmp_path / "parts", 4)["updates"] == 2
    tune(base, tmp_path / "parts", lora_load=str(tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert record(tmp_path / "parts", 6) == record(tmp_path / "whole", 6)


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_without_a_trained_token_changes_nothing_and_is_passed(world: int, base: Path, tmp_path: Path) -> None:
    """The run goes on over it as if its samples were not there, and is resumed behind it."""
    from modellink_lora.data.corpus import InstructionCorpus, writing_corpus

    source = InstructionCorpus(str(base.parent / "data"))
    silent = {1: (1,), 2: (2, 3, 4)}[world]  # at two processes a whole step, and the part of one process
    for name, without in (("mixed", ()), ("spoken", silent if world == 1 else silent[:2])):
        with writing_corpus(str(tmp_path / name), {}) as writer:
            for number in range(6):
                ids, labels = (part.tolist() for part in source[number])
                if number not in without:
                    writer.add(ids, [1] * len(ids), [-100] * len(ids) if number in silent else labels)
    settings: dict[str, Any] = {"global_batch_size": world, "world": world, "weight_decay": 0.1, "min_lr": 1e-2}
    overlap = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather") if world > 1 else ()
    settings |= dict.fromkeys(overlap, True)
    for name, steps in (("mixed", 6 // world), ("spoken", 6 // world - 1)):
        data = {"data_path": (str(tmp_path / name),), "shuffle": False}
        lines, _ = tune(base, tmp_path / f"{name}-run", data=data, **settings, train_iters=steps)
        assert not any(line.startswith("error") for line in lines)
    for name, tensor in adapter_tensors(tmp_path / "spoken-run").items():
        assert torch.equal(adapter_tensors(tmp_path / "mixed-run")[name], tensor)
    training = record(tmp_path / "mixed-run", 6 // world)
    assert (training["updates"], training["skipped"], training["not_finite"]) == (6 // world - 1, 1, 0)
    assert training["empty_micro_batches"] == len(silent) and training["consumed_samples"] == 6


def test_a_restarted_job_goes_on_from_what_it_has_saved_itself(base: Path, first: Path, tmp_path: Path) -> None:
    for name, given in (("new", {}), ("loaded", {"lora_load": str(first), "finetune": True}),
                        ("resumed", {"lora_load": str(first), "no_load_optim": True})):  # fmt: skip
        save = tmp_path / name
        tune(base, save, exit_interval=4, **given)
        lines, _ = tune(base, save, attempt=1, **given)
        assert re.match(r"restarted by the launcher \(1\)", lines[0]) and lines[1].startswith("resuming at iteration 4")
        assert record(save, 6)["iteration"] == 6 and not list(save.glob("earlier-*"))
    document = json.loads((save / "run.json").read_text())
    for process in document["sessions"][-1]["processes"]:
        process["launcher"] = "another"
    (save / "run.json").write_text(json.dumps(document))
    lines, _ = tune(base, save, attempt=1)  # the first attempt died before it had looked at the folder
    assert "holds another run" in lines[0] and (save / "earlier-1/iter_0000006").is_dir()


@pytest.mark.slow
def test_torchrun_restarts_a_job_where_it_was(tmp_path: Path) -> None:
    """Two processes of which one is killed; before, the second attempt wrote over what the first had saved."""
    source, save = make_source(tmp_path), tmp_path / "run"
    words = flags(source, save, **{"train-iters": 400})
    with Job(PRODUCT, *words, log=tmp_path / "log", launcher=(*TORCHRUN, "--max-restarts", "1")) as job:
        job.until(lambda: saved(save) >= 6, seconds=240)
        kill(job.workers()[-1], signal.SIGKILL)
        job.until(lambda: "resuming at iteration" in job.text and "training ..." in job.text.rpartition("resuming")[2])
        again = int(re.findall(r"resuming at iteration (\d+)", job.text)[0])
        assert again >= 6 and "restarted by the launcher (1)" in job.text
        job.until(lambda: saved(save) > again)
    assert not list(save.glob("earlier-*"))


def test_a_new_run_keeps_the_checkpoints_of_another_apart(base: Path, first: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    shutil.copytree(first, save)
    lines, _ = tune(base, save, exit_interval=1)
    (line,) = [line for line in lines if "holds another run" in line]
    assert f"kept in {save}/earlier-1" in line
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000001"]
    lines, _ = tune(base, tmp_path / "more", lora_load=str(save / "earlier-1"), exit_interval=3)
    assert lines[0].startswith("resuming at iteration 2") and losses(save / "earlier-1") == losses(first)
    lines, _ = tune(base, save, lora_load=str(save), finetune=True)
    assert "would take its place; name another --save" in lines[-1] and read_tracker(save, flag="") == 1
    tune(base, save, lora_load=str(first), exit_interval=3)  # of another folder: not of this run either
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000003"] and read_tracker(save, flag="") == 3


def test_checkpoints_after_the_one_that_is_resumed_are_kept_apart(tmp_path: Path) -> None:
    for iteration in (2, 4, 6):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    write_tracker(tmp_path, 6)
    best = tmp_path / "best_checkpointed_iteration.txt"
    best.write_text("4")
    assert set_later_aside(tmp_path, 6) is None
    assert set_later_aside(tmp_path, 2) == tmp_path / "earlier-1"
    assert {path.name for path in (tmp_path / "earlier-1").glob("iter_*")} == {"iter_0000004", "iter_0000006"}
    assert read_tracker(tmp_path, flag="") == 2 and read_tracker(tmp_path / "earlier-1", flag="") == 6
    assert not best.exists() and (tmp_path / "earlier-1" / best.name).read_text() == "4"


def test_a_move_that_was_killed_is_finished_by_the_next_run(tmp_path: Path) -> None:
    half = tmp_path / "earlier-1"
    for folder in (half / "iter_0000002", tmp_path / "iter_0000004"):
        folder.mkdir(parents=True)
    write_tracker(tmp_path, 4)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert set_aside(tmp_path, logs=("metrics.jsonl", "run.json")) == half
    names = {"iter_0000002", "iter_0000004", TRACKER, "metrics.jsonl"}
    assert {path.name for path in half.iterdir()} == names and [path.name for path in tmp_path.iterdir()] == [half.name]
    assert set_aside(tmp_path, logs=()) is None
