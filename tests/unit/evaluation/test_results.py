"""Counts, tables, files and the chart, from answers that are known."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.evaluation.chart import draw
from modellink_lora.evaluation.results import Tally, comparison, table, tallies, write_csv
from modellink_lora.evaluation.statistics import mcnemar, paired_difference, wilson

CATEGORIES = {"algebra": "STEM", "history": "humanities"}


def records(*answers: tuple[str, bool, bool]) -> list[dict[str, Any]]:
    return [
        {"subject": subject, "number": n, "models": {"base": {"correct": base}, "tuned": {"correct": tuned}}}
        for n, (subject, base, tuned) in enumerate(answers)
    ]


@pytest.fixture
def rows() -> list[Tally]:
    return tallies(
        records(
            ("algebra", True, True), ("algebra", False, True), ("algebra", False, True), ("algebra", True, False),
            ("history", False, True), ("history", False, False),
        ),
        CATEGORIES,
    )  # fmt: skip


def test_answers_are_counted_by_subject_category_and_in_total(rows: list[Tally]) -> None:
    counted = [(row.kind, row.name, row.items, row.right["base"], row.right["tuned"]) for row in rows]
    assert counted == [
        ("subject", "algebra", 4, 2, 3), ("subject", "history", 2, 0, 1),
        ("category", "STEM", 4, 2, 3), ("category", "humanities", 2, 0, 1), ("total", "total", 6, 2, 4),
    ]  # fmt: skip
    assert (rows[0].better["tuned"], rows[0].worse["tuned"]) == (2, 1)


def test_a_single_category_is_not_repeated(rows: list[Tally]) -> None:
    assert [row.kind for row in tallies(records(("algebra", True, True)), CATEGORIES)] == ["subject", "total"]


def test_the_table_is_that_of_modellink(rows: list[Tally]) -> None:
    lines = [line.split() for line in table(rows, "tuned").splitlines()]
    assert lines == [
        ["subject", "question_n", "acc"], ["algebra", "4", "0.750000"], ["history", "2", "0.500000"],
        ["total", "6", "0.666667"],
    ]  # fmt: skip


def test_the_comparison_says_difference_interval_and_p(rows: list[Tally]) -> None:
    last = comparison(rows, "tuned").splitlines()[-1]
    low, high = paired_difference(3, 1, 6)
    assert last.startswith("total")
    assert f"+33.3 [{100 * low:+6.1f}, {100 * high:+6.1f}]" in last and last.endswith(f"{mcnemar(3, 1):7.2g}")


def test_the_csv_holds_every_number(rows: list[Tally], tmp_path: Path) -> None:
    write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        total = list(csv.DictReader(file))[-1]
    low, high = wilson(4, 6)
    assert (total["group"], total["question_n"], total["tuned_correct"]) == ("total", "6", "4")
    assert float(total["tuned_low"]) == pytest.approx(low) and float(total["tuned_high"]) == pytest.approx(high)
    assert float(total["tuned_difference"]) == pytest.approx(1 / 3)
    assert float(total["tuned_mcnemar_p"]) == pytest.approx(mcnemar(3, 1))


def test_the_chart_is_a_picture_that_grows_with_the_subjects(rows: list[Tally], tmp_path: Path) -> None:
    def height(rows: list[Tally]) -> int:
        draw(rows, "mmlu", tmp_path / "a.png", chance=0.25)
        return int(struct.unpack(">I", (tmp_path / "a.png").read_bytes()[20:24])[0])

    many = tallies(records(*((f"subject_{n}", True, n % 2 == 0) for n in range(20))), {})
    assert 200 < height(rows) < height(many) < 4000
