"""Small charts as inline SVG: lines over iterations, stacked columns and bars. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 34
MOST_POINTS = 400  # more would not be seen, and make the page heavy
MOST_COLUMNS = 48
SMOOTH_FROM = 40  # points from which a smoothed line is drawn over the raw one


def line_chart(series: Mapping[str, Points], *, noisy: bool, dots: Sequence[str] = ()) -> str:
    """Lines by name over iterations.

    Args:
        noisy: draw long lines pale under their moving average.
        dots: names of series that are few single measurements, drawn as dots joined by a line.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    everything = [point for points in finite.values() for point in points]
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    frame = _Frame(min(xs), max(xs), *_padded(min(ys), max(ys)))
    body = [frame.axes()]
    for index, (name, points) in enumerate(finite.items()):
        colour = f"c{index}"
        if name in dots:
            body.append(frame.path(points, f"line {colour}"))
            body += [frame.dot(x, y, colour, f"{name} at iteration {x:g}: {y:.6g}") for x, y in points]
            continue
        thin = thinned(points)
        long = noisy and len(thin) >= SMOOTH_FROM
        body.append(frame.path(thin, f"{'raw' if long else 'line'} {colour}"))
        if long:
            body.append(frame.path(smoothed(thin), f"line {colour}"))
        if len(points) == 1:
            body.append(frame.dot(*points[0], colour, f"{name}: {points[0][1]:.6g}"))
    return _svg(WIDTH, HEIGHT, "".join(body)) + (_legend(dict(enumerate(finite))) if len(finite) > 1 else "")


def stacked_columns(rows: Sequence[tuple[float, Mapping[str, float]]], *, unit: str) -> str:
    """One column of stacked parts for each (iteration, part -> value); neighbours are averaged when there are many."""
    if not rows:
        return ""
    parts = list(rows[0][1])
    each = -(-len(rows) // MOST_COLUMNS)
    groups = [rows[start : start + each] for start in range(0, len(rows), each)]
    columns = [(g[-1][0], {p: sum(row[p] for _, row in g) / len(g) for p in parts}) for g in groups]
    highest = max(sum(values.values()) for _, values in columns) or 1.0
    frame = _Frame(0, max(len(columns), 12), 0, highest * 1.05)  # two columns are not two walls
    body = [frame.axes(unit, xs=False)]
    labelled = max(1, len(columns) // 6)
    for index, (iteration, values) in enumerate(columns):
        below, left, right = 0.0, frame.x(index + 0.1), frame.x(index + 0.9)
        for colour, part in enumerate(parts):
            top, bottom = frame.y(below + values[part]), frame.y(below)
            below += values[part]
            tip = f"iteration {iteration:g}, {part}: {values[part]:.1f} {unit}"
            body.append(_rectangle(left, top, right - left, bottom - top, f"p{colour}", tip))
        if index % labelled == 0:
            body.append(_text((left + right) / 2, HEIGHT - BOTTOM + 16, f"{iteration:g}", "middle"))
    return _svg(WIDTH, HEIGHT, "".join(body))


def stacked_bars(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One horizontal bar for each name, all of the same length: the shares of its parts."""
    left, width, height = 92, 820, 26
    body = []
    for index, (name, values) in enumerate(rows.items()):
        total, x, y = sum(values.values()) or 1.0, float(left), index * (height + 8) + 4
        body.append(_text(left - 8, y + height / 2 + 4, name, "end"))
        for colour, (part, value) in enumerate(values.items()):
            share = value / total
            wide = share * (width - left)
            body.append(_rectangle(x, y, wide, height, f"p{colour}", f"{part}: {value:.1f} ms, {100 * share:.1f} %"))
            if wide > 44:
                body.append(_text(x + wide / 2, y + height / 2 + 4, f"{100 * share:.0f} %", "middle", "inside"))
            x += wide
    return _svg(width, len(rows) * (height + 8) + 4, "".join(body))


def part_legend(parts: Sequence[str]) -> str:
    """The names of stacked parts with their colours."""
    return _legend(dict(enumerate(parts)), "p")


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points: means of equally many neighbours."""
    each = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Points) -> Points:
    """Mean over a twentieth of the points around each: unlike an average of the past it does not lag behind."""
    reach = max(2, len(points) // 40)
    near = [points[max(0, index - reach) : index + reach + 1] for index in range(len(points))]
    return [(x, sum(y for _, y in around) / len(around)) for (x, _), around in zip(points, near, strict=True)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`."""
    rough = (high - low) / most
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Data coordinates to picture coordinates."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self._x_low, self._x_high = x_low, x_high if x_high > x_low else x_low + 1
        self._y_low, self._y_high = y_low, y_high

    def x(self, value: float) -> float:
        return LEFT + (value - self._x_low) / (self._x_high - self._x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._y_low) / (self._y_high - self._y_low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, unit: str = "", *, xs: bool = True) -> str:
        parts = []
        for value in ticks(self._y_low, self._y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(LEFT - 6, y + 4, short(value), "end"))
        for value in ticks(self._x_low, self._x_high) if xs else ():
            if value == int(value):
                parts.append(_text(self.x(value), HEIGHT - BOTTOM + 16, short(value), "middle"))
        parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "iteration", "end", "axis"))
        parts.append(_text(4, HEIGHT - 4, unit, "start", "axis"))
        return "".join(parts)

    def path(self, points: Points, style: str) -> str:
        steps = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{style}" points="{steps}"/>'

    def dot(self, x: float, y: float, style: str, tip: str) -> str:
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'
        return f'<circle class="dot {style}" {place} r="3.2"><title>{escape(tip)}</title></circle>'


def short(value: float) -> str:
    """A number for an axis: few characters, and exact for the round numbers that ticks are."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return (low - room if low < 0 or low > room else 0.0), high + room


def _rectangle(x: float, y: float, width: float, height: float, style: str, tip: str) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="{style}" {size}><title>{escape(tip)}</title></rect>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Mapping[int, str], kind: str = "c") -> str:
    items = "".join(f'<span><i class="{kind}{index}"></i>{escape(name)}</span>' for index, name in names.items())
    return f'<div class="legend">{items}</div>'


def _svg(width: float, height: float, body: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{body}</svg>'
