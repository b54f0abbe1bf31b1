"""Draws docs/figures/cc_lora.svg and cc_lora.zh-CN.svg: two linears on two ranks, plain and under --lora-fusion.

    python docs/figures/cc_lora.py

Heights are tokens and widths are features, so a buffer's border is seen as one. Backward runs along the same axis as
forward, from right to left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 704
LANE, TALL = 62, 44  # of a rank; of a buffer with all tokens
WIDE, CUT, THIN = 50, 28, 9  # h features, a rank's share of the features between the linears, r columns
TOKENS = ("#b5d3ee", "#6aa5d8")  # of rank 0, of rank 1
BORDER = ("#fdc276", "#f08c1a")
SEND, SEND_LOW, INK, FAINT = "#34679a", "#d97706", "#1f2933", "#8794a1"
# left edges along the common axis: input, its collective, gathered, after W1, before W2, partial, collective, output
INPUT, FIRST, WHOLE, MIDDLE, ACTED, PARTIAL, SECOND, OUTPUT = 100, 182, 250, 418, 494, 616, 702, 770
GAP = 6  # between what is sent apart

TEXTS = {
    "": {
        "plain": "Plain path: 8 collectives, 4 of them for r columns alone",
        "fused": "--lora-fusion: 4 collectives, the r columns are a border of what is sent anyway",
        "forward": "forward", "backward": "backward", "rank": "rank", "column": "column linear",
        "row": "row linear (primed)", "act": "SwiGLU", "gather": "all-gather", "scatter": "reduce-scatter",
        "legend": ("tokens of rank 0", "tokens of rank 1", "r columns of the adapter", "sent between the ranks"),
    },
    ".zh-CN": {
        "plain": "普通路径：8 次集合通信，其中 4 次只传 r 列",
        "fused": "--lora-fusion：4 次集合通信，r 列作为边框搭乘原本就要发送的缓冲区",
        "forward": "前向", "backward": "反向", "rank": "rank", "column": "列并行线性层",
        "row": "行并行线性层（带撇号）", "act": "SwiGLU", "gather": "all-gather", "scatter": "reduce-scatter",
        "legend": ("rank 0 的 token", "rank 1 的 token", "适配器的 r 列", "rank 之间的通信"),
    },
}  # fmt: skip
# formulas by path: what stands at each place, for rank k
FORMULAS = {
    "plain": {
        "down": "S_k = x_k A^T", "first": ("X W_k^T", "+ s S B_k^T"), "second": ("Z_k W'_k^T", "S' = Z_k A'_k^T"),
        "up": "+ s S'_k B'^T", "dup": "U'_k = dY_k B'", "dsecond": ("dY W'_k", "+ s U' A'_k"),
        "dfirst": ("dV_k W_k", "U = dV_k B_k"), "ddown": "+ s U_k A",
    },
    "fused": {
        "down": "S_k = x_k A^T", "first": ("[X | s S] ×", "[W_k | B_k]^T"), "second": ("Z_k ×", "[W'_k ; A'_k]^T"),
        "up": "+ s S'_k B'^T", "dup": "U'_k = dY_k B'", "dsecond": ("[dY | s U'] ×", "[W'_k ; A'_k]"),
        "dfirst": ("dV_k ×", "[W_k | B_k]"), "ddown": "+ s U_k A",
    },
}  # fmt: skip


def text(x: float, y: float, said: str, *, size: float = 12, anchor: str = "middle", more: str = "") -> str:
    """A line of text in which _k lowers and ^T raises the letter behind it."""
    pieces, shift = [], 0
    for part in re.split(r"(_\w|\^\w)", said):
        raised = {"_": 3, "^": -4}.get(part[:1], 0) if len(part) == 2 else 0
        body = part[1:] if raised else part
        if body:
            style = f' font-size="{size * 0.72:g}"' if raised else ""
            pieces.append(f'<tspan dy="{raised - shift}"{style}>{escape(body)}</tspan>')
            shift = raised
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" {more}>{"".join(pieces)}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0) -> str:
    stroke = "none" if radius else "white"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="0.8"/>'
    )


def matrix(x: float, middle: float, width: float, owners: Sequence[int], *, border: float | None = None) -> list[str]:
    """A buffer with the tokens of `owners` one below the other; r columns `border` pixels beside it."""
    drawn, height = [], TALL / 2
    for number, owner in enumerate(owners):
        top = middle + (number - len(owners) / 2) * height
        drawn.append(rectangle(x, top, width, height, TOKENS[owner]))
        if border is not None:
            drawn.append(rectangle(x + width + border, top, THIN, height, BORDER[owner]))
    return drawn


def arrow(start: float, end: float, y: float) -> str:
    return f'<path d="M{start:g} {y:g}H{end:g}" stroke="{INK}" stroke-width="1.3" marker-end="url(#head)"/>'


def link(x: float, top: float, name: str, wide: str, low: str, *, border: float) -> list[str]:
    """A collective between both lanes, as wide as what it sends; that of r columns beside it or inside its edge."""
    height = 2 * LANE - 14
    y, centre = top + 7, top + LANE

    def label(at: float, said: str, colour: str, size: float) -> str:
        turned = f'transform="rotate(-90 {at:g} {centre:g})" fill="{colour}"'
        return text(at, centre + size * 0.35, said, size=size, more=turned)

    if border:
        return [
            rectangle(x, y, 26, height, SEND, radius=3), label(x + 13, f"{name}  {wide}", "white", 11.5),
            rectangle(x + 26 + border, y, 16, height, SEND_LOW, radius=3),
            label(x + 34 + border, f"{name}  {low}", "white", 11),
        ]  # fmt: skip
    return [
        rectangle(x + 4, y, 26, height, SEND, radius=3), rectangle(x + 29, y, THIN, height, SEND_LOW, radius=2),
        label(x + 17, name, "white", 12),
    ]  # fmt: skip


def product(left: float, right: float, y: float, lines: Sequence[str], *, back: bool) -> list[str]:
    """An arrow with what it multiplies by above and below."""
    centre = (left + right) / 2
    ends = (right - 4, left + 6) if back else (left + 4, right - 6)
    return [arrow(*ends, y), text(centre, y - 7, lines[0], size=12), text(centre, y + 17, lines[1], size=12)]


def direction(path: str, top: float, words: dict[str, str], *, back: bool) -> list[str]:
    """Both linears on both ranks, forward or backward."""
    border, said = (float(GAP) if path == "plain" else 0.0), FORMULAS[path]
    gathered, low, summed = ("dY", "U", "dX") if back else ("X", "S", "Y")
    drawn = []
    for rank in (0, 1):
        y = top + LANE * (rank + 0.5)

        def of(key: str, index: int | None = None, rank: int = rank) -> str:
            found = said[key] if index is None else said[key][index]
            return str(found).replace("_k", f"_{rank}")

        drawn.append(text(8, y + 4, f"{words['rank']} {rank}", size=12, anchor="start"))
        start, whole, partial = (matrix(x, y, WIDE, owners, border=border) for x, owners in
                                 ((INPUT, [rank]), (WHOLE, [0, 1]), (PARTIAL, [0, 1])))  # fmt: skip
        end = matrix(OUTPUT, y, WIDE, [rank], border=border if back else None)
        if back:
            start = matrix(INPUT, y, WIDE, [rank])
        drawn += start + whole + partial + end
        drawn += matrix(MIDDLE, y, CUT, [0, 1]) + matrix(ACTED, y, CUT, [0, 1])
        edge = WIDE + border + THIN
        for left, right in ((INPUT + (WIDE if back else edge), FIRST), (FIRST + 52, WHOLE),
                            (PARTIAL + edge, SECOND), (SECOND + 52, OUTPUT)):  # fmt: skip
            drawn.append(arrow(*((right - 1, left + 6) if back else (left + 2, right - 5)), y))
        d = "d" * back
        drawn += product(WHOLE + edge, MIDDLE, y, (of(f"{d}first", 0), of(f"{d}first", 1)), back=back)
        drawn += product(ACTED + CUT, PARTIAL, y, (of(f"{d}second", 0), of(f"{d}second", 1)), back=back)
        acted = (ACTED - 3, MIDDLE + CUT + 6) if back else (MIDDLE + CUT + 3, ACTED - 6)
        drawn += [arrow(*acted, y), text((MIDDLE + CUT + ACTED) / 2, y - 6, words["act"], size=10)]
        at_input, at_output = (of("ddown"), of("dup")) if back else (of("down"), of("up"))
        named = f"{'dX' if back else 'x'}_{rank}", f"{'dY' if back else 'y'}_{rank}"
        drawn += [text(INPUT + WIDE / 2, y + 4, named[0], size=12), text(OUTPUT + WIDE / 2, y + 4, named[1], size=12)]
        drawn += [text(INPUT + 32, y + 25, at_input, size=11.5), text(OUTPUT + 32, y + 25, at_output, size=11.5)]
        drawn += [text(WHOLE + WIDE / 2, y + 4, "dX" if back else "X", size=12),
                  text(PARTIAL + WIDE / 2, y + 4, "dY" if back else "Y", size=12),
                  text(MIDDLE + CUT / 2, y + 4, f"{'dV' if back else 'V'}_{rank}", size=11),
                  text(ACTED + CUT / 2, y + 4, f"{'dZ' if back else 'Z'}_{rank}", size=11)]  # fmt: skip
    gather, scatter = (words["gather"], gathered), (words["scatter"], summed)
    first, second = (scatter, gather) if back else (gather, scatter)
    drawn += link(FIRST, top, *first, low, border=border)
    drawn += link(SECOND, top, *second, f"{low}'", border=border)
    return drawn


def panel(path: str, top: float, words: dict[str, str]) -> list[str]:
    bold = 'font-weight="bold"'
    drawn = [text(8, top, words[path], size=15, anchor="start", more=bold)]
    for back in (False, True):
        y = top + 12 + back * (2 * LANE + 16)
        drawn.append(rectangle(2, y, WIDTH - 4, 2 * LANE, "#f4f6f8", radius=4))
        name = words["backward"] if back else words["forward"]
        drawn.append(text(8, y + LANE + 4, f"← {name}" if back else f"{name} →", size=12, anchor="start", more=bold))
        drawn += direction(path, y, words, back=back)
    return drawn


def legend(y: float, words: Sequence[str]) -> list[str]:
    drawn, x = [], 74.0
    for fill, said in zip((TOKENS[0], TOKENS[1], BORDER[1], SEND), words, strict=True):
        drawn += [rectangle(x, y - 11, 16, 13, fill), text(x + 22, y, said, size=12, anchor="start")]
        x += 200
    return drawn


def picture(words: dict[str, str]) -> str:
    faint = f'fill="{FAINT}"'
    drawn = [
        text((INPUT + MIDDLE + CUT) / 2, 18, words["column"], size=13, more=faint),
        text((ACTED + OUTPUT + WIDE) / 2, 18, words["row"], size=13, more=faint),
        *panel("plain", 44, words), *panel("fused", 370, words), *legend(HEIGHT - 12, words["legend"]),
    ]  # fmt: skip
    body = "\n".join(drawn)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"
 font-family="Helvetica, Arial, 'DejaVu Sans', 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif">
<defs><marker id="head" viewBox="0 0 6 6" refX="1" refY="3" markerWidth="5" markerHeight="5" orient="auto">
<path d="M0 0L6 3L0 6z" fill="{INK}"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<g fill="{INK}">
{body}
</g>
</svg>
"""


def main() -> None:
    for language, words in TEXTS.items():
        Path(__file__).with_name(f"cc_lora{language}.svg").write_text(picture(words))


if __name__ == "__main__":
    main()
