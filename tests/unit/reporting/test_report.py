"""The log line that users' parsers read, metrics.jsonl over a resume, and the loss curve."""

from __future__ import annotations

import importlib.machinery
import json
import re
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.reporting import trackers
from modellink_lora.reporting.report import Reporter, draw_losses, log_line
from modellink_lora.reporting.trackers import Wandb

VALUES: dict[str, Any] = dict(
    iteration=7, train_iters=2000, consumed_samples=224, milliseconds=1234.56, tflops=98.76, learning_rate=1.25e-6,
    batch_size=32, loss=1.2221093, loss_scale=1.0, grad_norm=0.12345, skipped=0, not_finite=2,
)  # fmt: skip
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration        7/    2000 \| consumed samples:          224 \|"
    r" elapsed time per iteration \(ms\): 1234\.6 \| throughput per GPU \(TFLOP/s/GPU\): 98\.8 \|"
    r" learning rate: 1\.250000E-06 \| global batch size:    32 \| lm loss: 1\.222109E\+00 \| loss scale: 1\.0 \|"
    r" grad norm: 0\.123 \| number of skipped iterations:   0 \| number of nan iterations:   2 \|"
)


def test_the_log_line_has_megatrons_fields_in_order_and_width() -> None:
    assert LINE.fullmatch(log_line(**VALUES))


@pytest.mark.parametrize(
    ("field", "label"), [("tflops", "throughput per GPU"), ("grad_norm", "grad norm"), ("loss", "lm loss")]
)
def test_a_number_that_was_not_measured_is_left_out(field: str, label: str) -> None:
    with_it, without = log_line(**VALUES), log_line(**{**VALUES, field: None})
    assert label in with_it and label not in without
    assert without.count("|") == with_it.count("|") - 1


def test_the_line_matches_what_parsers_of_throughput_and_loss_look_for() -> None:
    found = re.search(r"throughput per GPU \(TFLOP/s/GPU\): (\S+) \|.*lm loss: (\S+) \|", log_line(**VALUES))
    assert found and [float(x) for x in found.groups()] == [98.8, 1.222109]


def reporter(folder: Path, *, start: int, speaks: bool = True) -> Reporter:
    return Reporter(speaks=speaks, folder=folder, tensorboard=None, start=start, total=4)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_the_lines_after_the_iteration_it_starts_from(tmp_path: Path) -> None:
    first = reporter(tmp_path, start=0)
    for iteration in (1, 2, 3):
        first.record(iteration, {"lm loss": 9.0})
    second = reporter(tmp_path, start=2)
    second.record(3, {"lm loss": 1.0})
    assert [(row["iteration"], row["lm loss"]) for row in rows(tmp_path)] == [(1, 9.0), (2, 9.0), (3, 1.0)]
    reporter(tmp_path, start=0)
    assert rows(tmp_path) == [], "a run from the beginning keeps nothing"


def test_the_loss_curve_is_drawn_as_a_png(tmp_path: Path) -> None:
    report = reporter(tmp_path, start=0)
    for iteration in (1, 2, 3, 4):
        report.record(iteration, {"lm loss": 4.0 / iteration, "grad norm": None})
    report.record(4, {"validation loss": 1.1})
    curve = report.close()
    assert curve == tmp_path / "loss.png"
    content = curve.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 5, "lm loss": 9.0}) + "\n")
    assert draw_losses(tmp_path / "metrics.jsonl").read_bytes() != content, "another curve is another picture"


def test_processes_other_than_the_first_say_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = reporter(tmp_path, start=0, speaks=False)
    silent.say("hello")
    silent.record(1, {"lm loss": 1.0})
    silent.step(1.0)
    assert silent.close() is None
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(speaks=True, folder=None, tensorboard=str(tmp_path), start=0, total=2)
    reporter.record(1, {"lm loss": 2.5, "grad norm": None})
    reporter.record(2, {"lm loss": 1.5})
    reporter.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["lm loss"]
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 2.5), (2, 1.5)]


class FakeRun:
    """Stands for a run of wandb."""

    dir, offline, url = "/tmp/wandb/run-1/files", False, "https://wandb.example/run-1"

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code, self.sent = -1, threading.Event()  # what is logged is sent, and the run may finish
        self.sent.set()

    def log(self, values: dict[str, float], step: int) -> None:
        if "lm loss" not in values:
            raise RuntimeError("the server is gone")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.sent.wait(60)
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module in wandb's place that hands out one FakeRun."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    run, calls = FakeRun(), []
    vars(module).update(run=run, calls=calls, Settings=lambda **kw: kw, init=lambda **kw: calls.append(kw) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_the_same_scalars_and_the_flags(
    wandb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"flags": [{"title": "Training", "rows": [["--lr", 0.1, 0.0]]}]}
    save = tmp_path / "my-run"
    with Reporter(
        speaks=True, folder=save, tensorboard=None, start=0, total=2, wandb=Wandb("project"), facts=facts
    ) as report:
        report.record(1, {"lm loss": 2.5, "grad norm": None})
        report.record(2, {"lm loss": 1.5})
    (call,) = wandb.calls
    assert (call["project"], call["name"], call["dir"], call["config"]) == ("project", "my-run", save, {"--lr": 0.1})
    assert wandb.run.logged == [(1, {"lm loss": 2.5}), (2, {"lm loss": 1.5})]
    assert wandb.run.exit_code == 0 and wandb.run.url in capsys.readouterr().out


def test_weights_and_biases_can_neither_stop_nor_hold_up_a_run(
    wandb: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.05)
    wandb.run.sent.clear()
    report = Reporter(speaks=True, folder=None, tensorboard=None, start=0, total=2, wandb=Wandb("project"))
    report.record(1, {"validation loss": 1.0})  # fails, and is the last that is sent
    report.record(2, {"lm loss": 1.0})
    report.close()
    assert wandb.run.exit_code == -1, "it still waits for its server"
    wandb.run.sent.set()
    assert wandb.run.logged == []
    assert "wandb sync /tmp/wandb/run-1" in capsys.readouterr().out


def test_without_the_package_every_process_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--wandb-project lab: the package wandb is not installed; pip install wandb"):
        Wandb("lab")
