"""The report of a run, `report.md` and a self-contained `report.html`, from its folder: run.json and metrics.jsonl."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import parse_document, read_text
from modellink_lora.config.errors import UserError
from modellink_lora.reporting.run_record import RUNNING, read_record
from modellink_lora.reporting.time_split import PARTS, mean_split

METRICS, HTML, MARKDOWN = "metrics.jsonl", "report.html", "report.md"
MOST_PROCESSES = 64  # rows of the table of processes; a larger job is summed up by pipeline stage


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; nothing if there is none. A last line that a killed run left unfinished is left out."""
    rows = []
    lines = read_text(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_document(line, dict[str, Any], where=f"{path} line {number}"))
        except UserError:
            if number < len(lines):
                raise
    return rows


def write_reports(folder: Path) -> Path:
    """Write both reports into `folder`; returns the path of the html. Raises UserError when it holds no run."""
    from modellink_lora.reporting.report_html import page

    report = Report.read(folder)
    for name, text in ((MARKDOWN, markdown(report)), (HTML, page(report))):
        with replacing_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / HTML


@dataclass(frozen=True)
class Table:
    """A table of the report; `strong` are the rows worth a second look."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Report:
    """What the two renderings show, read from a folder."""

    folder: Path
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Report:
        return cls(folder, read_record(folder), read_metrics(folder / METRICS))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def session(self) -> Mapping[str, Any]:
        return self.record["sessions"][-1]

    @property
    def status(self) -> str:
        status = str(self.session["status"])
        return "running, or killed" if status == RUNNING else status

    def series(self, key: str) -> list[tuple[float, float]]:
        """(iteration, value) of a metric, values that are no numbers left out."""
        points = [(row["iteration"], row[key]) for row in self.metrics if row.get(key) is not None]
        return [(x, y) for x, y in points if math.isfinite(y)]

    def split(self) -> list[tuple[float, dict[str, float]]]:
        """(iteration, milliseconds by part) of every measured step, mean over processes."""
        rows = [row for row in self.metrics if f"{PARTS[0]} ms" in row]
        return [(row["iteration"], {part: row[f"{part} ms"] for part in PARTS}) for row in rows]

    def mean_split(self) -> dict[str, float]:
        """Mean of all measured steps."""
        rows = [values for _, values in self.split()]
        return {part: sum(values[part] for values in rows) / len(rows) for part in PARTS} if rows else {}

    def stage_splits(self) -> dict[str, dict[str, float]]:
        """The last measured step by pipeline stage."""
        return {f"last, stage {stage}": mean_split(ranks) for stage, ranks in self._stages().items()}

    def _stages(self) -> dict[int, list[Mapping[str, float]]]:
        stages: dict[int, list[Mapping[str, float]]] = {}
        for process, rank in zip(self.session.get("processes") or [], self._ranks(), strict=False):
            stages.setdefault(process["pp"], []).append(rank)
        return stages

    def _ranks(self) -> Sequence[Mapping[str, float]]:
        return (self.record.get("measured") or {}).get("ranks") or []

    def highlights(self) -> list[tuple[str, str]]:
        """The few numbers one looks for first, as (what, value)."""
        rows = [("status", self.status)]
        losses, validation = self.series("lm loss"), self.series("validation loss")
        if losses:
            rows.append(("iterations", f"{losses[-1][0]:,.0f}"))
            rows.append(("training loss, first to last", f"{losses[0][1]:.4f} → {losses[-1][1]:.4f}"))
        if validation:
            best = min(validation, key=lambda point: point[1])
            rows.append(("best validation loss", f"{best[1]:.4f} at iteration {best[0]:,.0f}"))
        rows += [(what, f"{number:,}") for what, number in self._without_loss().items() if number]
        for key, what, form in (
            ("tokens/s", "tokens/s, without padding", "{:,.0f}"),
            ("trained tokens/s", "trained tokens/s", "{:,.0f}"),
            ("TFLOP/s/device", "TFLOP/s a device", "{:,.3g}"),
            ("MFU", "model FLOP/s utilisation", "{:.1%}"),
        ):
            middle = _median([value for _, value in self.series(key)])
            if middle is not None:
                rows.append((what, form.format(middle)))
        if self._ranks():
            rows.append(("most memory on a process", _memory(max(rank["memory"] for rank in self._ranks()))))
        if self.session.get("ended"):
            rows.append(("time", _duration(self.session["started"], self.session["ended"])))
        return rows

    def _without_loss(self) -> dict[str, int]:
        """How many steps were skipped, and validations gave no number."""
        held_out = [row["validation loss"] for row in self.metrics if "validation loss" in row]
        return {
            "skipped steps": sum("skipped step loss" in row for row in self.metrics),
            "validations without a loss": sum(loss is None or not math.isfinite(loss) for loss in held_out),
        }

    def notes(self) -> list[str]:
        return [str(note) for note in self.record.get("notes", [])]

    def tables(self) -> list[Table]:
        """Everything that is told in tables, in the order of the report."""
        record = self.record
        adapters, fusion = (record.get(key) or {"header": (), "rows": ()} for key in ("adapters", "fusion"))
        found = [
            Table("Run", ("", ""), record.get("summary", [])),
            Table("Trainable parameters", adapters["header"], adapters["rows"]),
            Table("CCLoRA", fusion["header"], fusion["rows"]),
            self._split_table(),
            self._memory_table(),
            self._estimate_table(),
            self._checkpoints(),
            self._sessions(),
            Table("Versions", ("", ""), list(map(list, record.get("versions", {}).items()))),
            *(_flag_table(group) for group in record.get("flags", [])),
        ]  # fmt: skip
        return [table for table in found if table.rows]

    def _split_table(self) -> Table:
        split = self.mean_split()
        total = sum(split.values()) or 1.0
        rows = [[part, f"{ms:,.1f}", f"{100 * ms / total:.1f} %"] for part, ms in split.items()]
        if rows:
            rows.append(["measured step", f"{total:,.1f}", "100 %"])
        count = len(self.split())
        return Table(f"Time of a step, mean of {count} measured", ("part", "ms", "share"), rows)

    def _memory_table(self) -> Table:
        title = "Most memory allocated"
        if (self.record.get("device") or {}).get("name") == "cpu":
            title = "Most memory, resident (the whole process, libraries included)"
        processes, ranks = self.session.get("processes") or [], self._ranks()
        if len(ranks) <= MOST_PROCESSES:
            rows = [
                [str(index), at["host"], f"TP {at['tp']} PP {at['pp']} DP {at['dp']}", _megabytes(rank["memory"])]
                for index, (at, rank) in enumerate(zip(processes, ranks, strict=False))
            ]
            return Table(title, ("rank", "host", "place", "MB"), rows)
        sizes = {stage: [rank["memory"] for rank in ranks] for stage, ranks in self._stages().items()}
        rows = [[str(stage), str(len(s)), _megabytes(min(s)), _megabytes(max(s))] for stage, s in sizes.items()]
        return Table(title, ("stage", "processes", "least MB", "most MB"), rows)

    def _estimate_table(self) -> Table:
        sizes = dict(self.record.get("memory", {}))
        rows = [[what, _megabytes(size)] for what, size in sizes.items()]
        if len(sizes) > 1:
            rows.append(["together", _megabytes(sum(sizes.values()))])
        return Table("Estimated memory of the first process", ("what", "MB"), rows)

    def _checkpoints(self) -> Table:
        rows = []
        for path in sorted(self.folder.glob("iter_*")):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            rows.append([path.name, _megabytes(size)])
        return Table("Checkpoints in this folder", ("folder", "MB"), rows)

    def _sessions(self) -> Table:
        rows = []
        for session in self.record["sessions"]:
            hosts = sorted({process["host"] for process in session.get("processes") or []})
            rows.append([
                str(session["started"]), f"{session['first']:,}", str(session["status"]),
                f"{len(session.get('processes') or []):,} on {_several(hosts)}", str(session.get("command") or ""),
            ])  # fmt: skip
        return Table("Sessions", ("started", "from iteration", "ended", "processes", "command of rank 0"), rows)


def markdown(report: Report) -> str:
    """The report as GitHub markdown."""
    lines = [f"# {report.name}", "", *(f"- **{what}**: {value}" for what, value in report.highlights()), ""]
    if (report.folder / "loss.png").is_file():
        lines += ["![loss](loss.png)", ""]
    if report.notes():
        lines += ["## Notes and warnings", "", *(f"- {' '.join(note.split())}" for note in report.notes()), ""]
    for table in report.tables():
        header = list(table.header) or [""] * len(table.rows[0])
        lines += [f"## {table.title}", "", _row(header), _row(["---"] * len(header))]
        for index, row in enumerate(table.rows):
            cells = [_cell(cell) for cell in row]
            lines.append(_row([f"**{cells[0]}**", *cells[1:]] if index in table.strong else cells))
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _flag_table(group: Mapping[str, Any]) -> Table:
    """Flags of one config class; those that differ from their default are strong."""
    rows = [[flag, _shown(value), _shown(default)] for flag, value, default in group["rows"]]
    strong = frozenset(index for index, (_, value, default) in enumerate(group["rows"]) if value != default)
    return Table(f"Configuration: {group['title']}", ("flag", "value", "default"), rows, strong)


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _several(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} hosts ({names[0]} ... {names[-1]})"


def _megabytes(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _memory(size: float) -> str:
    return f"{size / 2**30:,.2f} GB" if size >= 2**30 else f"{_megabytes(size)} MB"


def _median(values: Sequence[float]) -> float | None:
    """The middle one: the first interval of a run holds its warm-up."""
    return sorted(values)[len(values) // 2] if values else None


def _duration(start: str, end: str) -> str:
    seconds = (datetime.datetime.fromisoformat(end) - datetime.datetime.fromisoformat(start)).total_seconds()
    return str(datetime.timedelta(seconds=round(seconds)))
