"""`report.html`: one file without scripts, fonts or anything else from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from modellink_lora.reporting.charts import line_chart, part_legend, stacked_bars, stacked_columns
from modellink_lora.reporting.run_report import Report, Table
from modellink_lora.reporting.time_split import PARTS

_LINES = ("#2f6fde", "#e0592a", "#1f9d6b", "#8b5cd6")
# data, forward, backward, three kinds of communication, optimizer, other
_PARTS = ("#8b8f98", "#2f6fde", "#12a594", "#f2b01e", "#e8772e", "#d6486a", "#8b5cd6", "#c3c8d0")

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1c2330; --pale: #667085; --edge: #dfe3ea;
  --grid: #e8ebf0; --mark: #fff6dd; --warn: #b54708; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --text: #e4e8ef; --pale: #98a2b3;
  --edge: #303846; --grid: #2a313d; --mark: #3a3220; --warn: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
p.under { color: var(--pale); margin: 0 0 22px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin-bottom: 16px; }
.card, section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 18px; }
.card b { display: block; font-size: 19px; font-weight: 650; overflow-wrap: anywhere; }
.card span { color: var(--pale); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
section { margin-bottom: 16px; min-width: 0; }
.charts section { margin: 0; }
.charts + section { margin-top: 16px; }
svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--grid); stroke-width: 1; }
.tick, .axis { fill: var(--pale); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.inside { fill: #fff; font-size: 12px; font-weight: 600; }
.line, .raw { fill: none; stroke-width: 2; stroke-linejoin: round; }
.raw { stroke-width: 1; opacity: .35; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--pale); margin-top: 8px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--pale); font-weight: 500; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.strong td { font-weight: 650; background: var(--mark); }
details summary { cursor: pointer; font-weight: 600; font-size: 15px; }
details table { margin-top: 10px; }
li { margin-bottom: 4px; overflow-wrap: anywhere; } .warning { color: var(--warn); }
@media print { body { background: none; } section, .card { break-inside: avoid; } }
"""


def page(report: Report) -> str:
    """The whole report as one html document."""
    body = "".join([
        f"<h1>{escape(report.name)}</h1>",
        f'<p class="under">LoRA fine-tuning, started {escape(str(report.session["started"]))}</p>',
        _cards(report.highlights()), _charts(report), _split(report), _notes(report.notes()),
        *(table_section(table) for table in report.tables()),
    ])  # fmt: skip
    colours = [f".c{i}{{stroke:{c}}}.dot.c{i}{{fill:{c}}}i.c{i}{{background:{c}}}" for i, c in enumerate(_LINES)]
    colours += [f".p{i}{{fill:{c}}}i.p{i}{{background:{c}}}" for i, c in enumerate(_PARTS)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: training report</title><style>{STYLE}{''.join(colours)}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _cards(rows: Sequence[tuple[str, str]]) -> str:
    cards = "".join(
        f'<div class="card"><span>{escape(what)}</span><b>{escape(value)}</b></div>' for what, value in rows
    )
    return f'<div class="cards">{cards}</div>'


def _charts(report: Report) -> str:
    series, scale = report.series, report.series("loss scale")
    charts = {
        "Loss (nats a trained token)": line_chart(
            {"training": series("lm loss"), "validation": series("validation loss"), "test": series("test loss")},
            noisy=True,
            dots=("validation", "test"),
        ),
        "Learning rate": line_chart({"learning rate": series("learning rate")}, noisy=False),
        "Gradient norm": line_chart({"gradient norm": series("grad norm")}, noisy=True),
        "Throughput (tokens/s, without padding)": line_chart(
            {"all tokens": series("tokens/s"), "trained tokens": series("trained tokens/s")},
            noisy=True,
        ),
        "Loss scale": line_chart({"loss scale": scale}, noisy=False) if len({y for _, y in scale}) > 1 else "",
    }
    sections = "".join(f"<section><h2>{escape(t)}</h2>{chart}</section>" for t, chart in charts.items() if chart)
    return f'<div class="charts">{sections}</div>' if sections else ""


def _split(report: Report) -> str:
    mean = report.mean_split()
    if not mean:
        return ""
    bars = {"mean": mean}
    stages = report.stage_splits()
    if len(stages) > 1:
        bars |= stages
    columns = stacked_columns(report.split(), unit="ms")
    return (
        "<section><h2>Where the time of a step goes</h2>"
        f'{stacked_bars(bars)}{part_legend(PARTS)}<div style="max-width:640px;margin-top:14px">{columns}</div>'
        '<p class="under" style="margin:8px 0 0">Measured steps wait for the device at every change of part, and their '
        "collectives do not overlap with computation: they are slower than the others. Communication holds the "
        "waiting for other processes.</p></section>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f'<li class="{"warning" if "warning" in note[:60] else ""}">{escape(note)}</li>' for note in notes)
    return f"<section><h2>Notes and warnings</h2><ul>{items}</ul></section>"


def table_section(table: Table) -> str:
    head = ""
    numeric = [index > 0 and all(_is_number(row[index]) for row in table.rows) for index in range(len(table.rows[0]))]
    style = [' class="number"' if number else "" for number in numeric]
    if any(table.header):
        head = "<tr>" + "".join(f"<th{s}>{escape(h)}</th>" for h, s in zip(table.header, style, strict=True)) + "</tr>"
    rows = ""
    for index, row in enumerate(table.rows):
        cells = "".join(f"<td{s}>{escape(str(cell))}</td>" for cell, s in zip(row, style, strict=True))
        rows += f'<tr class="strong">{cells}</tr>' if index in table.strong else f"<tr>{cells}</tr>"
    content = f'<div class="scroll"><table>{head}{rows}</table></div>'
    if len(table.rows) > 12:
        shown = f", {len(table.strong)} not at their default" if table.strong else ""
        note = f"{escape(table.title)} ({len(table.rows)} rows{shown})"
        return f"<section><details><summary>{note}</summary>{content}</details></section>"
    return f"<section><h2>{escape(table.title)}</h2>{content}</section>"


def _is_number(text: object) -> bool:
    return str(text).replace(",", "").replace("%", "").strip().replace(".", "", 1).isdigit()
