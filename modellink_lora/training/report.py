"""What a run tells: the start summary, Megatron's log line, metrics.jsonl, TensorBoard and the loss curve."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from modellink_lora.checkpoint.store import replacing_file

METRICS, CURVE = "metrics.jsonl", "loss.png"


def print_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """One table on standard output, plain on a pipe. The last column is right-aligned when there is a header."""
    table = Table(title=title, show_header=bool(header), title_justify="left")
    for index in range(len(rows[0])):
        last = bool(header) and index == len(rows[0]) - 1
        table.add_column(header[index] if header else "", justify="right" if last else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def log_line(
    *, iteration: int, train_iters: int, consumed_samples: int, milliseconds: float, tflops: float | None,
    learning_rate: float, batch_size: int, loss: float, loss_scale: float, grad_norm: float | None,
    skipped: int, not_finite: int,
) -> str:  # fmt: skip
    """Megatron's training log line; users' parsers rely on its field order and widths."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f" [{now}] iteration {iteration:8d}/{train_iters:8d} |",
        f" consumed samples: {consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {milliseconds:.1f} |",
        f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |" if tflops is not None else "",
        f" learning rate: {learning_rate:.6E} |",
        f" global batch size: {batch_size:5d} |",
        f" lm loss: {loss:.6E} |",
        f" loss scale: {loss_scale:.1f} |",
        f" grad norm: {grad_norm:.3f} |" if grad_norm is not None else "",
        f" number of skipped iterations: {skipped:3d} |",
        f" number of nan iterations: {not_finite:3d} |",
    ]
    return "".join(parts)


class Reporter:
    """Rank 0's voice; the same object is silent on other ranks, so that callers need not ask.

    Args:
        folder: where metrics.jsonl and loss.png go; None keeps no files.
        start: iteration the run starts at; later lines of an interrupted run are dropped from metrics.jsonl.
    """

    def __init__(self, *, speaks: bool, folder: Path | None, tensorboard: str | None, start: int, total: int) -> None:
        self.speaks = speaks
        self.metrics = folder / METRICS if speaks and folder else None
        if self.metrics:
            self._keep_metrics_until(start)
        self.writer: Any = None
        if speaks and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(tensorboard)
        on_terminal = speaks and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, disable=not on_terminal, unit="step", desc="training")

    def say(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, iteration: int, values: Mapping[str, float | int | None]) -> None:
        """Append one line of metrics and the same scalars to TensorBoard."""
        if self.metrics:
            with self.metrics.open("a") as file:
                file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self.writer:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, iteration)

    def step(self, loss: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update()

    def close(self) -> Path | None:
        """End the bar, flush, draw the loss curve; returns its path if one was drawn."""
        self.bar.close()
        if self.writer:
            self.writer.close()
        return draw_losses(self.metrics) if self.metrics and self.metrics.is_file() else None

    def _keep_metrics_until(self, iteration: int) -> None:
        assert self.metrics is not None
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        lines = self.metrics.read_text().splitlines() if self.metrics.is_file() and iteration else []
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
        with replacing_file(self.metrics) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))


def draw_losses(metrics: Path) -> Path:
    """Draw training and validation loss of a metrics.jsonl into loss.png beside it."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("lm loss", "training", "-"), ("validation loss", "validation", "o--")):
        points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    axes.set(xlabel="iteration", ylabel="loss (nats per trained token)", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    target = metrics.with_name(CURVE)
    with replacing_file(target) as temporary:
        figure.savefig(temporary, format="png")
    return target
