"""From answered items to shares per subject, category and in total, of each model and between them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.evaluation.progress import Record
from modellink_lora.evaluation.statistics import mcnemar, paired_difference, wilson
from modellink_lora.inference.request import BASE

SUBJECT, CATEGORY, TOTAL = "subject", "category", "total"


@dataclass
class Tally:
    """Counts over some items.

    Args:
        right: model -> right answers.
        better: tuned model -> items that it answers and the base does not; `worse` the other way round.
    """

    kind: str
    name: str
    items: int = 0
    right: dict[str, int] = field(default_factory=dict)
    better: dict[str, int] = field(default_factory=dict)
    worse: dict[str, int] = field(default_factory=dict)

    def add(self, correct: Mapping[str, bool]) -> None:
        self.items += 1
        for model, is_right in correct.items():
            self.right[model] = self.right.get(model, 0) + is_right
            if BASE in correct and model != BASE:
                self.better[model] = self.better.get(model, 0) + (is_right and not correct[BASE])
                self.worse[model] = self.worse.get(model, 0) + (correct[BASE] and not is_right)

    def share(self, model: str) -> float:
        return self.right[model] / self.items

    def as_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"group": self.kind, "name": self.name, "question_n": self.items}
        for model, right in self.right.items():
            low, high = wilson(right, self.items)
            values |= {f"{model}_correct": right, f"{model}_acc": self.share(model),
                       f"{model}_low": low, f"{model}_high": high}  # fmt: skip
        for model, better in self.better.items():
            worse = self.worse[model]
            low, high = paired_difference(better, worse, self.items)
            values |= {
                f"{model}_difference": (better - worse) / self.items,
                f"{model}_difference_low": low, f"{model}_difference_high": high,
                f"{model}_only_right": better, f"{BASE}_only_right_against_{model}": worse,
                f"{model}_mcnemar_p": mcnemar(better, worse),
            }  # fmt: skip
        return values


def tallies(records: Sequence[Record], categories: Mapping[str, str | None]) -> list[Tally]:
    """Subjects in their order, then categories if there are several, then the total."""
    subjects: dict[str, Tally] = {}
    groups: dict[str, Tally] = {}
    total = Tally(TOTAL, TOTAL)
    for record in records:
        subject = record["subject"]
        correct = {model: bool(answer["correct"]) for model, answer in record["models"].items()}
        category = categories.get(subject)
        subjects.setdefault(subject, Tally(SUBJECT, subject)).add(correct)
        if category is not None:
            groups.setdefault(category, Tally(CATEGORY, category)).add(correct)
        total.add(correct)
    return [*subjects.values(), *(groups.values() if len(groups) > 1 else ()), total]


def table(rows: Sequence[Tally], model: str) -> str:
    """The columns that ModelLink prints, of one model: subjects and the total."""
    shown = [row for row in rows if row.kind != CATEGORY]
    width = max(len("subject"), *(len(row.name) for row in shown))
    lines = [f"{'subject':>{width}}  question_n       acc"]
    lines += [f"{row.name:>{width}}  {row.items:10}  {row.share(model):8.6f}" for row in shown]
    return "\n".join(lines)


def comparison(rows: Sequence[Tally], model: str) -> str:
    """Base and `model` side by side, with what the difference is worth."""
    width = max(len("subject"), *(len(row.name) for row in rows))
    head = (
        f"{'':{width}}  {'n':>6}  {BASE + ' [95 %]':>22}  {model + ' [95 %]':>22}  {'difference [95 %]':>24}  {'p':>7}"
    )
    lines = [head]
    for row in rows:
        if row.kind != SUBJECT and lines[-1] and row is next(r for r in rows if r.kind == row.kind):
            lines.append("-" * len(head))
        cells = [f"{row.name:{width}}  {row.items:6}"]
        for name in (BASE, model):
            low, high = wilson(row.right[name], row.items)
            cells.append(f"{100 * row.share(name):6.1f} [{100 * low:5.1f}, {100 * high:5.1f}]".rjust(22))
        better, worse = row.better[model], row.worse[model]
        low, high = paired_difference(better, worse, row.items)
        gained = 100 * (better - worse) / row.items
        cells.append(f"{gained:+7.1f} [{100 * low:+6.1f}, {100 * high:+6.1f}]".rjust(24))
        cells.append(f"{mcnemar(better, worse):7.2g}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write_csv(rows: Sequence[Tally], path: Path) -> None:
    values = [row.as_json() for row in rows]
    with replacing_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(values[-1]))
        writer.writeheader()
        writer.writerows(values)
