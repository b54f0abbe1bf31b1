"""One thing that was looked at, how it is, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "info", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's table."""

    topic: str  # the table's heading
    what: str
    found: str
    level: Level = "ok"
    advice: str = ""  # what to do, where not all is well
    rank: int | None = None  # the process that found it, where there are several

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "problem"]


def merged(of_ranks: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """What all ranks found, alike lines once: those of rank 0 first, each naming its ranks where not all found it.

    Args:
        hosts: of the ranks.
    """
    everyone = len(of_ranks)
    alike: dict[tuple[str, str, Level], list[tuple[int, Finding]]] = {}
    for rank, findings in enumerate(of_ranks):
        for finding in findings:
            alike.setdefault((finding.topic, finding.what, finding.level), []).append((rank, finding))
    result = []
    for same in alike.values():
        rank, first = same[0]
        texts = {finding.found for _, finding in same}
        found = first.found
        if everyone > 1 and len(same) < everyone:
            found = f"{_names([rank for rank, _ in same], hosts)}: {found}"
        elif len(texts) > 1:
            found = f"{found} (rank {rank}; others differ)"
        result.append(dataclasses.replace(first, found=found, rank=rank if everyone > 1 else None))
    return result


def _names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`ranks 2 3 on host b`"""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return ", ".join(f"rank{'s' * (len(r) > 1)} {' '.join(map(str, r))} on host {host}" for host, r in by_host.items())
