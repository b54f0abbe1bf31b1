"""A comparison as tables: for the terminal, as Markdown, and as one html file without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.evaluation.comparison import BASE, Comparison, Variant
from modellink_lora.reporting.report import print_table
from modellink_lora.reporting.report_html import STYLE, table_section
from modellink_lora.reporting.run_report import Table

MARKDOWN, PAGE = "compare.md", "compare.html"
_HEADER = ("model", "logits differ by", "x rounding", "same best token", "same answers", "tokens/s", "weights",
           "cache", "peak MiB")  # fmt: skip
_MIB = 2**20


def show(comparison: Comparison, say: Callable[[str], None]) -> None:
    """The tables on the terminal."""
    table = numbers(comparison)
    print_table(table.title, table.rows, table.header)
    for prompt, rows in zip(comparison.prompts, answers(comparison), strict=True):
        say(f"\n{prompt!r}")
        for name, text in rows:
            say(f"  {name:14} {text!r}")
    say("")
    for line in verdicts(comparison):
        say(line)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Both reports in `folder`; their paths."""
    paths = []
    for name, text in ((MARKDOWN, markdown(comparison)), (PAGE, page(comparison))):
        with replacing_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        paths.append(folder / name)
    return paths


def numbers(comparison: Comparison) -> Table:
    """A row for each variant; those that are wrong stand out."""
    expected = _variant(comparison, comparison.reference)
    rows = []
    for one in comparison.variants:
        gap = one.gap
        same = sum(mine == theirs for mine, theirs in zip(one.ids, expected.ids, strict=True))
        rows.append((
            one.name, f"{gap.largest:.3g}" if gap else "reference",
            f"{gap.noises:.1f}" if gap and gap.allowed else "",
            f"{gap.same_best} of {gap.positions}" if gap else "", f"{same} of {len(one.ids)}" if gap else "",
            f"{one.tokens_per_second:.1f}", *(f"{x / _MIB:.1f}" for x in (one.weight_bytes, one.cache_bytes,
                                                                         one.peak_bytes)),
        ))  # fmt: skip
    wrong = frozenset(n for n, one in enumerate(comparison.variants) if one in comparison.wrong)
    return Table("Base, unmerged and merged on the same prompts", _HEADER, rows, wrong)


def answers(comparison: Comparison) -> list[list[tuple[str, str]]]:
    """For each prompt (name of the variant, its answer); variants that answer alike share a line."""
    found = []
    for number in range(len(comparison.prompts)):
        names: dict[str, list[str]] = {}
        for variant in comparison.variants:
            names.setdefault(variant.answers[number], []).append(variant.name)
        found.append([(", ".join(who), text) for text, who in names.items()])
    return found


def verdicts(comparison: Comparison) -> list[str]:
    """What the numbers mean, in words."""
    lines = []
    reference, base = comparison.reference, next((x for x in comparison.variants if x.name == BASE and x.gap), None)
    if base is not None and base.gap is not None:
        lines.append(f"base: its logits differ from those of {reference} by up to {base.gap.largest:.3g}; that is what "
                     "the adapter does")  # fmt: skip
    for one in comparison.variants:
        gap = one.gap
        if gap is None or gap.allowed is None:
            continue
        dtype = str(gap.dtype).removeprefix("torch.")
        size = f"Its logits differ by up to {gap.largest:.3g}, {gap.noises:.3g} times what rounding to {dtype} does"
        if gap.too_large:
            lines.append(f"{one.name}: NOT the same model as {reference}. {size} ({gap.allowed:g} times is allowed): "
                         f"{one.where} was made of another adapter, alpha, rank or base; convert it again")  # fmt: skip
        else:
            lines.append(f"{one.name}: the same model as {reference}. {size}")
            if base is not None and base.gap is not None and base.gap.largest <= gap.largest:
                lines[-1] += "; the base is as near, so these prompts do not show whether the adapter was merged"
    return lines


def markdown(comparison: Comparison) -> str:
    table = numbers(comparison)
    lines = [f"# {table.title}", "", ", ".join(f"{what} {value}" for what, value in comparison.about.items()), ""]
    lines += ["| " + " | ".join(table.header) + " |", "|" + " --- |" * len(table.header)]
    for index, row in enumerate(table.rows):
        cells = [f"**{cell}**" if cell and index in table.strong else cell for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {line}" for line in verdicts(comparison)), "", f"- {_explanation(comparison)}", ""]
    for name, where in _places(comparison):
        lines.append(f"- {name}: `{where}`")
    lines += [f"- {line}" for line in comparison.notes]
    lines += ["", "## Answers", ""]
    for prompt, rows in zip(comparison.prompts, answers(comparison), strict=True):
        lines += [f"### {_one_line(prompt)}", "", "| model | answer |", "| --- | --- |"]
        lines += [f"| {name} | {_one_line(text)} |" for name, text in rows]
        lines.append("")
    return "\n".join(lines)


def page(comparison: Comparison) -> str:
    table = numbers(comparison)
    bad = len(comparison.wrong)
    items = "".join(
        f'<li class="{"warning" if "NOT" in line else ""}">{escape(line)}</li>' for line in verdicts(comparison)
    )
    sections = [
        f"<h1>{escape(table.title)}</h1>",
        f'<p class="under">{escape(", ".join(f"{what} {value}" for what, value in comparison.about.items()))}</p>',
        f"<section><h2>{'A merged model is wrong' if bad else 'Verdict'}</h2><ul>{items}</ul></section>",
        table_section(table), f'<p class="under">{escape(_explanation(comparison))}</p>',
        *(table_section(Table(prompt, ("model", "answer"), rows))
          for prompt, rows in zip(comparison.prompts, answers(comparison), strict=True)),
        table_section(Table("Where they lie", ("model", "folder"), _places(comparison))),
    ]  # fmt: skip
    if comparison.notes:
        notes = "".join(f"<li>{escape(line)}</li>" for line in comparison.notes)
        sections.append(f"<section><h2>Notes</h2><ul>{notes}</ul></section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(table.title)}</title><style>{STYLE}td {{ white-space: pre-line; }}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _explanation(comparison: Comparison) -> str:
    return (
        f"Answers are greedy. Logits are compared at every position of each prompt and of the answer of "
        f"{comparison.reference} to it. Tokens/s count answers, prompts included in the time. Memory is in MiB: "
        "weights of the whole model, cache and peak of the first process; base and unmerged are loaded together."
    )


def _places(comparison: Comparison) -> Sequence[tuple[str, str]]:
    return [(one.name, one.where) for one in comparison.variants]


def _variant(comparison: Comparison, name: str) -> Variant:
    return next(one for one in comparison.variants if one.name == name)


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "\\|").strip()
