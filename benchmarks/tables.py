"""Writes the tables of the pages below docs from benchmarks/results, between table marks.

    python -m benchmarks.tables

A table says below itself on what machine, with which versions, when and by what command it was made. A table whose
result file is missing says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "features"
PAGES = {"en": DOCS / "cc_lora.md", "zh": DOCS / "cc_lora.zh-CN.md"}
MARKER = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ENGLISH = [DOCS.parent / name for name in ("formats.md", "inference.md", "evaluation.md")]
WORDS = {  # what is not a number or a name: English: Chinese
    "peer": "对象", "collectives": "集合通信次数", "of its own": "其中 LoRA 自有",
    "LoRA bytes / base": "LoRA 字节 / 基座",
    "dtype": "精度", "model": "模型", "machine": "机器", "link": "链路", "tokens": "token 数", "ranks": "进程数",
    "place": "位置", "share of the update kept": "保留的更新比例", "error of the branch": "分支误差",
    "ratio": "比值", "replay": "回放", "ratio of minima": "最小值之比", "shape": "形状", "sizes": "尺寸",
    "calls": "调用次数", "over input": "相对输入", "bytes": "字节", "added": "增加", "layer bytes": "单层字节",
    "median": "中位数", "frozen, us": "冻结，微秒", "eager, us": "逐算子，微秒", "graph, us": "CUDA 图，微秒",
    "repetitions": "重复次数", "one rank": "单进程", "ours / PEFT": "本项目 / PEFT", "GiB": "GiB",
    "not measured yet": "尚未测量", "by": "命令", "load": "负载", "threads": "线程", "column, TP2 SP": "列切分，TP2 SP",
    "row, TP2 SP": "行切分，TP2 SP", "recompute": "重算",
}  # fmt: skip
Row = list[str]
Table = tuple[Row, list[Row]]


def collectives(data: dict[str, Any]) -> Table:
    head = ["TP", "SP", "peer", "collectives", "of its own", "LoRA bytes / base"]
    return head, [
        [str(row["tp"]), "SP" if row["sp"] else "-", row["peer"], str(row["calls"]),
         "-" if row["owned"] is None else str(row["owned"]), f"{row['bytes_over_base']:.2%}"]
        for row in data["rows"] if row["peer"] != "frozen"
    ]  # fmt: skip


def replay(data: dict[str, Any], sp: bool) -> Table:
    rows = [row for row in data["rows"] if row["sp"] == sp]
    peers = [peer for peer in rows[0]["ratio"] if peer != "frozen"]
    head = ["model", "TP", "machine", "frozen, us", *peers]
    return head, [
        [row["model"], str(row["tp"]), row["machine"], f"{row['frozen_us']:.0f}",
         *(f"{row['ratio'][peer]:.2f}" for peer in peers)] for row in rows
    ]  # fmt: skip


def measured(data: dict[str, Any]) -> Table:
    head = ["link", "peer", "ratio", "ratio of minima", "replay", "repetitions"]
    return head, [
        [f"{row['link']['latency'] * 1e3:.0f} ms, {row['link']['bandwidth'] / 1e6:.0f} MB/s", peer,
         f"{entry['ratio']:.2f}", f"{entry['ratio_of_minima']:.2f}", f"{entry['replay_ratio']:.2f}",
         str(entry["repetitions"])]
        for row in data["rows"] for peer, entry in row["peers"].items()
    ]  # fmt: skip


def survival(data: dict[str, Any]) -> Table:
    head = ["place", "peer", "share of the update kept", "error of the branch"]
    return head, [
        [place, peer, f"{entry['share']:.1%}", f"{entry['branch_error']:.2%}"]
        for place, peers in data["rows"].items() for peer, entry in peers.items()
    ]  # fmt: skip


def _by_shape(rows: Iterable[dict[str, Any]], lead: Callable[[dict[str, Any]], Row], head: Row) -> Table:
    """One row a shape, one column a peer; not every row has every peer."""
    rows = list(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"] if peer != "frozen"))
    return [*head, *peers], [
        [*lead(row), *(f"{row['peers'][peer]['ratio']:.2f}" if peer in row["peers"] else "-" for peer in peers)]
        for row in rows
    ]


def times(data: dict[str, Any]) -> Table:
    def lead(row: dict[str, Any]) -> Row:
        return ["x".join(map(str, row["shape"])), row["dtype"], str(row["p"])]

    head, rows = _by_shape(data["times"], lead, ["shape", "dtype", "p"])
    for entry in data["summary"]:
        medians = [f"**{entry['median_ratio'][p]:.2f}**" if p in entry["median_ratio"] else "-" for p in head[3:]]
        rows.append(["median", entry["dtype"], str(entry["p"]), *medians])
    return head, rows


def calls(data: dict[str, Any]) -> Table:
    return ["peer", "p=0.0", "p=0.1"], [
        [peer, *(str(entry[p]["calls"]) if p in entry else "-" for p in ("p=0.0", "p=0.1"))]
        for peer, entry in data["calls"].items()
    ]


def saved_linear(data: dict[str, Any]) -> Table:
    return ["peer", "p=0.0", "p=0.1"], [
        [peer, *(f"{entry[p]['over_input']:.3f}" for p in ("p=0.0", "p=0.1"))]
        for peer, entry in data["saved"]["linear"].items()
    ]


def saved_layer(data: dict[str, Any]) -> Table:
    return ["ranks", "p", "peer", "layer bytes", "added"], [
        [ranks, str(row["p"]), row["peer"], f"{row['bytes'] / 1e6:.1f} MB", f"{row['added']:+.2%}"]
        for ranks, rows in data["saved"]["layer"].items() for row in rows
    ]  # fmt: skip


def gpu(data: dict[str, Any]) -> Table:
    def lead(row: dict[str, Any]) -> Row:
        return [row["shape"], "x".join(map(str, row["sizes"])), str(row["r"]), str(row["p"])]

    return _by_shape(data["linears"], lead, ["shape", "sizes", "r", "p"])


def gpu_short(data: dict[str, Any]) -> Table:
    rows = []
    for entry in data["short"]:
        for peer in dict.fromkeys(name.split(",")[0] for name in entry["peers"]):
            cells = [entry["peers"].get(f"{peer}, {way}") for way in ("eager", "graph")]
            rows.append([str(entry["tokens"]), peer, *(f"{c['seconds'] * 1e6:.0f}" if c else "-" for c in cells)])
    return ["tokens", "peer", "eager, us", "graph, us"], rows


def gpu_dram(data: dict[str, Any]) -> Table:
    return ["peer", "GiB"], [
        [peer, f"{value:.3f}" if isinstance(value, float) else value] for peer, value in data["dram"].items()
    ]


def conversion(data: dict[str, Any]) -> Table:
    head = ["model", "case", "seconds", "over cp", "CPU seconds", "anonymous MB", "repetitions"]
    rows = []
    for size, result in data["sizes"].items():
        for case, entry in result["cases"].items():
            rows.append([
                size, case, f"{entry['seconds']:.1f}", f"{entry['ratio']:.2f}", f"{entry['cpu']:.1f}",
                f"{entry['anonymous'] / 1e6:.0f}", str(entry["repetitions"]),
            ])  # fmt: skip
        rows.append([size, "goal", "", ", ".join(f"{case} {ratio:g}" for case, ratio in result["goals"].items()), "",
                     f"{result['memory_goal'] / 1e6:.0f}", ""])  # fmt: skip
    return head, rows


def decoding(data: dict[str, Any]) -> Table:
    rows = []
    for batch, result in data["batches"].items():
        for case, entry in result["cases"].items():
            over = result["speed_over"].get(case)
            rows.append([
                batch, {"base": "ours, base", "tuned": "ours, adapter"}.get(case, case),
                f"{entry['tokens_per_second']:.1f}", f"{over:.2f}" if over else "", str(entry["repetitions"]),
            ])  # fmt: skip
        rows.append([batch, "ours, adapter over base in time", "", f"{result['adapter_over_base']:.2f}", ""])
    return ["prompts", "case", "tokens a second", "ours over transformers, PEFT", "repetitions"], rows


def scoring(data: dict[str, Any]) -> Table:
    return ["case", "questions a second", "over lm-eval", "repetitions"], [
        [{"lm-eval": "lm-eval, merged in transformers", "ours": "ours, adapter unmerged"}[case],
         f"{entry['samples_per_second']:.2f}", f"{1 / entry['ratio']:.2f}", str(entry["repetitions"])]
        for case, entry in data["cases"].items()
    ]  # fmt: skip


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Table]]] = {  # marker: result file, maker
    "collectives": ("lora-counted", collectives),
    "replay-sp": ("lora-replay", lambda data: replay(data, True)),
    "replay-no-sp": ("lora-replay", lambda data: replay(data, False)),
    "measured-link": ("lora-measured", measured),
    "survival": ("lora-survival", survival),
    "cpu-time": ("lora-linear", times),
    "aten-calls": ("lora-linear", calls),
    "saved-linear": ("lora-linear", saved_linear),
    "saved-layer": ("lora-linear", saved_layer),
    "conversion": ("convert", conversion),
    "decoding": ("generate", decoding),
    "scoring": ("evaluate", scoring),
    "gpu-linear": ("lora-gpu", gpu),
    "gpu-short": ("lora-gpu", gpu_short),
    "gpu-dram": ("lora-gpu", gpu_dram),
}


def said(word: str, language: str) -> str:
    return WORDS.get(word, word) if language == "zh" else word


def markdown(table: Table, language: str) -> str:
    head, rows = table
    lines = [[said(word, language) for word in head], ["---"] * len(head)]
    lines += [[said(cell, language) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def provenance(data: dict[str, Any], language: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    device = f"{data['accelerator']}, " if data.get("accelerator") else ""
    return (
        f"\n{data['date']}, {device}{data['machine']}, {data['system']}, {versions}; {said('threads', language)} "
        f"{data['threads']}, {said('load', language)} {data['load']}; {said('by', language)} `{data['command']}`\n"
    )


def filled(text: str, language: str, results: Path = RESULTS) -> str:
    """The page with every table made anew. Raises KeyError for a marker that no table has."""

    def fill(match: re.Match[str]) -> str:
        file, make = TABLES[match[2]]
        path = results / f"{file}.json"
        if not path.exists():
            return f"{match[1]}*{said('not measured yet', language)}*\n{match[3]}"
        data = json.loads(path.read_text(encoding="utf-8"))
        return match[1] + markdown(make(data), language) + provenance(data, language) + match[3]

    return MARKER.sub(fill, text)


def main() -> None:
    for language, page in [*PAGES.items(), *(("en", page) for page in ENGLISH)]:
        page.write_text(filled(page.read_text(encoding="utf-8"), language), encoding="utf-8")
        print(f"written: {page}")


if __name__ == "__main__":
    main()
