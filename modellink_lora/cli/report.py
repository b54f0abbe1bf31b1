"""`modellink-lora report DIR`: the report of a run, made again from its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Write DIR/report.md and DIR/report.html. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="modellink-lora report",
        description="Write report.md and report.html of a training run into its --save folder, from the run.json and "
        "metrics.jsonl there; also while the run goes on, and after it was killed.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="--save of the run")
    folder: Path = parser.parse_args(argv).folder
    from modellink_lora.reporting.run_report import write_reports

    print(f"report: {write_reports(folder)}")
    return 0
