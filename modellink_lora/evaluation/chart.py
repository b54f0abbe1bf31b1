"""`accuracy.png`: the shares of base and tuned beside each other, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.evaluation.results import CATEGORY, SUBJECT, TOTAL, Tally
from modellink_lora.evaluation.statistics import wilson
from modellink_lora.inference.request import BASE

_COLOURS = ("#a9b2bc", "#00798c", "#d1495b", "#edae49", "#30638e", "#6a4c93")  # grey is always the base
_BAR = 0.17  # inches of one model's bar


def draw(rows: Sequence[Tally], title: str, path: Path, *, chance: float | None) -> None:
    """Horizontal bars, total first, then categories, then subjects.

    Args:
        chance: the share that guessing reaches, marked by a line.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    groups = [[row for row in rows if row.kind == kind] for kind in (TOTAL, CATEGORY, SUBJECT)]
    if len(groups[-1]) == 1:  # one subject is the total
        groups.pop()
    models = list(rows[-1].right)
    places: list[tuple[float, Tally]] = []
    y = 0.0
    for group in groups:
        places += [(y + n, row) for n, row in enumerate(group)]
        y += len(group) + (0.5 if group else 0)
    height = 1.5 + y * max(0.22, _BAR * len(models))
    figure = Figure(figsize=(8.5, max(2.6, height)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / len(models)
    for n, model in enumerate(models):
        shares = [100 * row.share(model) for _, row in places]
        ends = [[100 * end for end in wilson(row.right[model], row.items)] for _, row in places]
        below = [max(0.0, share - low) for share, (low, _) in zip(shares, ends)]
        above = [max(0.0, high - share) for share, (_, high) in zip(shares, ends)]
        colour = _COLOURS[0] if model == BASE else _COLOURS[1 + (n - (BASE in models)) % (len(_COLOURS) - 1)]
        at = [place + (n - (len(models) - 1) / 2) * thick for place, _ in places]
        axes.barh(
            at, shares, thick * 0.94, xerr=(below, above), color=colour, label=model,
            error_kw={"elinewidth": 0.9, "capsize": 1.8, "ecolor": "#333333"},
        )  # fmt: skip
        for place, share, (_, high) in zip(at, shares, ends):
            axes.text(high + 0.8, place, f"{share:.1f}", va="center", fontsize=7, color="#333333")
    if chance is not None:
        axes.axvline(100 * chance, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
        axes.text(
            100 * chance, 1.0, "guessing", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=7
        )
    labels = [f"{row.name.replace('_', ' ')}  ({row.items})" for _, row in places]
    axes.set_yticks([place for place, _ in places], labels, fontsize=8)
    for label, (_, row) in zip(axes.get_yticklabels(), places):
        label.set_fontweight("bold" if row.kind != SUBJECT else "normal")
    axes.set_ylim(places[-1][0] + 0.6, -0.6)
    axes.set_xlim(
        0, min(108.0, max(40.0, 8 + max(100 * wilson(r.right[m], r.items)[1] for _, r in places for m in models)))
    )
    axes.set_xlabel("right answers in %, with 95 % intervals", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=10, loc="left", pad=16)
    if len(models) > 1:
        figure.legend(loc="outside lower center", ncols=len(models), fontsize=8, frameon=False)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png")
