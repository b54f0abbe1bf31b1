"""What a run tells while it goes: tables at the start, Megatron's log line, metrics.jsonl, a loss curve at the end."""

from __future__ import annotations

import datetime
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import to_json
from modellink_lora.reporting.run_record import RunRecord
from modellink_lora.reporting.run_report import METRICS, read_metrics, write_reports
from modellink_lora.reporting.time_split import Window
from modellink_lora.reporting.trackers import TensorBoard, Tracker, Wandb

CURVE = "loss.png"
PACKAGE = "modellink_lora"  # the logger above all of ours


def print_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """One table on standard output, plain on a pipe. Under a header, numbers in the last column are right-aligned."""
    table = Table(title=title, show_header=bool(header), title_justify="left")
    for index in range(len(rows[0])):
        last = bool(header) and index == len(rows[0]) - 1 and rows[0][-1].lstrip()[:1].isdigit()
        table.add_column(header[index] if header else "", justify="right" if last else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def log_line(
    *, iteration: int, train_iters: int, consumed_samples: int, milliseconds: float, tflops: float | None,
    learning_rate: float, batch_size: int, loss: float | None, loss_scale: float, grad_norm: float | None,
    skipped: int, not_finite: int,
) -> str:  # fmt: skip
    """Megatron's training log line; users' parsers rely on its field order and widths.

    Args:
        loss, grad_norm: None where no step was taken; their fields are then left out, as Megatron does.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f" [{now}] iteration {iteration:8d}/{train_iters:8d} |",
        f" consumed samples: {consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {milliseconds:.1f} |",
        f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |" if tflops is not None else "",
        f" learning rate: {learning_rate:.6E} |",
        f" global batch size: {batch_size:5d} |",
        f" lm loss: {loss:.6E} |" if loss is not None else "",
        f" loss scale: {loss_scale:.1f} |",
        f" grad norm: {grad_norm:.3f} |" if grad_norm is not None else "",
        f" number of skipped iterations: {skipped:3d} |",
        f" number of nan iterations: {not_finite:3d} |",
    ]
    return "".join(parts)


class Reporter:
    """Rank 0's voice; the same object is silent on other ranks, so that callers need not ask.

    As a context manager it closes everything and writes the report however the block ends.

    Args:
        folder: where metrics.jsonl, run.json, loss.png and the reports go; None keeps no files.
        start: iteration the run starts at; later lines of an interrupted run are dropped from metrics.jsonl.
        facts: see `run_record.run_facts`; None keeps no record and writes no report.
    Attributes:
        ending: how the run ended, for the report; set it where a run is stopped on purpose.
        report: report.html, once it is written.
    """

    def __init__(
        self, *, speaks: bool, folder: Path | None, tensorboard: str | None, start: int, total: int,
        wandb: Wandb | None = None, facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.speaks = speaks
        self.ending = "completed"
        self.report: Path | None = None
        self.metrics = folder / METRICS if speaks and folder else None
        self.run_record: RunRecord | None = None
        self._last: int | None = None
        self._trackers: list[Tracker] = []
        if self.metrics:
            self._keep_metrics_until(start)
            if facts is not None:
                self.run_record = RunRecord(self.metrics.parent, facts, start=start)
        if speaks and tensorboard:
            self._trackers.append(TensorBoard(tensorboard))
        if speaks and wandb:
            self._trackers.append(wandb.start(facts or {}, folder))
        self._warnings = _Warnings(self._keep_note)
        logging.getLogger(PACKAGE).addHandler(self._warnings)
        on_terminal = speaks and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, disable=not on_terminal, unit="step", desc="training")

    def say(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            if text.startswith("warning"):
                self._keep_note(text)

    def record(self, iteration: int, values: Mapping[str, float | int | None]) -> None:
        """Append one line of metrics and give the same scalars to the trackers.

        What is no number is null in the file, as JSON knows no NaN, and is not given to trackers.
        """
        self._last = iteration
        values = {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}
        if self.metrics:
            with self.metrics.open("a") as file:
                file.write(to_json({"iteration": iteration, **values}, ensure_ascii=True) + "\n")
        known = {name: value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(iteration, known)

    def performance(self, iteration: int, window: Window) -> None:
        """Record the rates of a log interval; when its last step was measured also say where the time went."""
        self.record(iteration, window.metrics())
        line = window.line()
        if line:
            self.say(line)
        if self.run_record and window.ranks:
            self.run_record.measured(iteration, window.ranks)
            self.run_record.write()

    def step(self, loss: float | None) -> None:
        """Move the bar; `loss` is None where the step was skipped."""
        self.bar.set_postfix_str("skipped" if loss is None else f"loss {loss:.4f}", refresh=False)
        self.bar.update()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.ending = "stopped by Ctrl-C"
        elif error is not None:
            self.ending = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
        try:
            self.close()
        except Exception as broken:
            if error is None:
                raise
            # the run's own error is the one to tell
            print(f"warning: the report could not be written: {broken}", file=sys.stderr)

    def close(self) -> Path | None:
        """End the bar, flush, draw the loss curve, write the reports; returns the curve's path if one was drawn."""
        self.bar.close()
        logging.getLogger(PACKAGE).removeHandler(self._warnings)
        curve = None
        if self.metrics and self.metrics.is_file():
            curve = draw_losses(self.metrics)
        if self.run_record and self.metrics:
            self.run_record.end(self.ending)
            self.report = write_reports(self.metrics.parent)
        # last: a tracker may wait for a network
        for tracker in self._trackers:
            told = tracker.close(good=self.ending == "completed")
            if told:
                self.say(told)
        self._trackers = []
        return curve

    def _keep_note(self, text: str) -> None:
        if self.run_record:
            when = "" if self._last is None else f"after iteration {self._last}: "
            self.run_record.note(when + text)

    def _keep_metrics_until(self, iteration: int) -> None:
        assert self.metrics is not None
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.metrics) if row["iteration"] <= iteration] if iteration else []
        with replacing_file(self.metrics) as temporary:
            temporary.write_text("".join(to_json(row, ensure_ascii=True) + "\n" for row in kept))


class _Warnings(logging.Handler):
    """Keeps what this package's loggers warn about, for the report; the lines still go where they went."""

    def __init__(self, keep: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        self._keep(f"warning: {record.getMessage()}")


def draw_losses(metrics: Path) -> Path:
    """Draw training and validation loss of a metrics.jsonl into loss.png beside it."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("lm loss", "training", "-"), ("validation loss", "validation", "o--")):
        points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    axes.set(xlabel="iteration", ylabel="loss (nats per trained token)", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    target = metrics.with_name(CURVE)
    with replacing_file(target) as temporary:
        figure.savefig(temporary, format="png")
    return target
