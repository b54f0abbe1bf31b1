"""Steps that fp16 skips are no steps: no loss, no average, no schedule, no result where there were no others.

Reported of other programs: runs that skipped every step went through and saved (NVIDIA/Megatron-LM#602, where the saved
optimizer was empty; deepspeedai/DeepSpeed#697, where nothing was learned).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.config.train import TrainConfig
from modellink_lora.training.loop import Loop
from modellink_lora.training.state import Progress
from tests.helpers.spawn import run
from tests.helpers.tiny import tiny_model
from tests.helpers.training import TARGETS, error_of, hf_to_megatron, train_flags, write_corpus

PP2, TP2 = {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}
NEVER = {"fp16": True, "initial_loss_scale": 2.0**100}  # halved for a few steps it still overflows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    write_corpus(folder / "data", samples=16)
    return hf_to_megatron(tiny_model("llama", folder / "hf"), folder / "mg")


def tune(base: Path, save: Path, parallel: dict[str, Any], *, stop: str | None = None, **train: Any) -> tuple[str, str]:
    """(error, the same on both processes; output of the first) of a run."""
    call = dict(
        train=train_flags(load=str(base), save=str(save), **{"lr_decay_style": "linear", "min_lr": 0.0, **train}),
        data={"data_path": (str(base.parent / "data"),), "seq_length": 32, "split": "12,4,0"},
        parallel=parallel,
        lora={"r": 4, "alpha": 8.0, "target_modules": TARGETS},
    )
    (error, output), (other, _) = run(said_by, world_size=2, arguments=call, stop=stop)
    assert error == other, "all processes come to the same end"
    return error, output


def said_by(arguments: dict[str, Any], stop: str | None) -> tuple[str, str]:
    import functools
    from unittest import mock

    from modellink_lora.training import job

    output = io.StringIO()
    stopped = functools.partial(job.fine_tune, stop=lambda: stop)
    with contextlib.redirect_stdout(output), mock.patch.object(job, "fine_tune", stopped):
        error = error_of(**arguments)
    return error, output.getvalue()


def rows(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_the_dynamic_loss_scale_starts_at_two_to_the_sixteenth() -> None:
    assert TrainConfig(lr=1e-4, train_iters=1).initial_loss_scale == 2**16
    with pytest.raises(UserError, match=r"--initial-loss-scale 0\.5 must be at least --min-loss-scale 1"):
        TrainConfig(lr=1e-4, train_iters=1, fp16=True, initial_loss_scale=0.5)


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [({}, {"use_distributed_optimizer": True}), (PP2, {}), pytest.param(TP2, {}, marks=pytest.mark.slow)],
    ids=["distopt", "pp2", "tp2"],
)
def test_a_skipped_step_adds_nothing_to_what_is_told(
    parallel: dict[str, Any], settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    scale = 2.0**26  # the first steps overflow, the later ones do not
    error, output = tune(base, tmp_path, parallel, fp16=True, initial_loss_scale=scale, train_iters=14, log_interval=2,
                         **settings)  # fmt: skip
    assert not error
    steps = {row["iteration"]: row for row in rows(tmp_path) if "loss scale" in row}
    taken = {iteration: row["lm loss"] for iteration, row in steps.items() if "lm loss" in row}
    skipped = [iteration for iteration in steps if iteration not in taken]
    assert 3 <= len(skipped) <= 12 and len(steps) == 14
    for iteration in skipped:
        row, before = steps[iteration], steps.get(iteration - 1)
        assert row["skipped step loss"] > 1 and row["grad norm"] is None and row["trained tokens"] == 0
        assert before is None or row["learning rate"] == before["learning rate"], "the schedule waits"
    told = re.findall(r"iteration +(\d+)/.*", output)
    assert told == [str(iteration) for iteration in range(2, 15, 2)]
    for line in re.findall(r".*iteration +\d+/.*", output):
        iteration = int(re.search(r"iteration +(\d+)/", line)[1])  # type: ignore[index]
        window = [taken[i] for i in (iteration - 1, iteration) if i in taken]
        assert ("lm loss" in line) == bool(window) and ("grad norm" in line) == (iteration in taken)
        assert not window or f"lm loss: {sum(window) / len(window):.6E}" in line
    training = json.loads((tmp_path / "iter_0000014/training.json").read_text())
    assert training["skipped"] == len(skipped) and training["updates"] == len(taken)
    assert training["scheduler"]["num_steps"] == 4 * len(taken) and training["consumed_samples"] == 4 * 14
    assert training["loss_scale"]["scale"] == steps[14]["loss scale"] < scale
    assert f"**skipped steps**: {len(skipped)}" in (tmp_path / "report.md").read_text()
    told_much = f"{len(skipped)} steps were skipped because their gradients overflowed" in output
    assert told_much == (len(skipped) > len(taken))


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        ({}, {"save_interval": 1, "eval_iters": 1, "eval_interval": 1, "save_best": True, "async_save": True}),
        (PP2, {"exit_interval": 2, "loss_scale": 2.0**100}),
    ],
    ids=["saves and validations", "exit and constant scale"],
)
def test_a_run_in_which_no_step_was_taken_fails_and_leaves_no_adapter(
    parallel: dict[str, Any], settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    error, output = tune(base, tmp_path, parallel, train_iters=3, log_interval=1, **NEVER, **settings)
    number = settings.get("exit_interval", 3)
    assert error.startswith(f"no step was taken: all {number} were skipped because their gradients overflowed")
    assert "\n" not in error and "lm loss: " not in output
    assert not list(tmp_path.glob("iter_*")) and not list(tmp_path.glob("*iteration.txt"))
    assert "failed: no step was taken" in (tmp_path / "report.md").read_text()


def test_what_was_skipped_for_want_of_a_trained_token_is_not_called_an_overflow() -> None:
    start, end = Progress(updates=3, skipped=1), Progress(updates=4, skipped=6)
    told: list[str] = []
    loop: Any = SimpleNamespace(train=SimpleNamespace(fp16=False), reporter=SimpleNamespace(say=told.append))
    loop.progress = end
    Loop._require_steps(loop, start, stopped=False)
    assert told[0].startswith("warning: 5 steps were skipped because they hold no trained token, only 1 were taken")
    loop.progress = Progress(skipped=2)
    with pytest.raises(UserError, match="no step was taken: all 2 were skipped because they hold no trained token"):
        Loop._require_steps(loop, Progress(), stopped=False)


def test_a_run_that_is_asked_to_stop_before_its_first_step_says_that_there_is_nothing(
    base: Path, tmp_path: Path
) -> None:
    error, output = tune(base, tmp_path, {}, train_iters=3, stop="SIGTERM", **NEVER)
    assert not error and not list(tmp_path.glob("iter_*"))
    assert "SIGTERM: stopping after iteration 1; no step was taken yet, so there is nothing to save" in output


def test_weights_that_leave_the_range_of_their_dtype_are_not_saved(base: Path, tmp_path: Path) -> None:
    settings = {"fp16": True, "initial_loss_scale": 2.0**10, "train_iters": 1, "lr": 1e6}
    error, _ = tune(base, tmp_path / "a", PP2, **settings)
    assert re.match(r"iteration 1: decoder.layers.\d.\S+.lora_B is not finite after the update, so this state", error)
    assert not list((tmp_path / "a").glob("iter_*"))
    error, output = tune(base, tmp_path / "b", {}, check_nan=False, **settings)
    assert not error and "is not finite after the update: this adapter cannot be used" in output
