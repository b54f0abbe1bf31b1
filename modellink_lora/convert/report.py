"""What merging did to the weights: how large the update is, and how much of it the result's dtype could not keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink_lora.adapters.merge import Change
from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.document import to_json
from modellink_lora.convert.plan import Plan

_HEAD = ("layer", "max |change|", "update / weight", "max rounding", "rounding / update")


@dataclass(frozen=True)
class MergeReport:
    """One row for each merged weight, in the order of the model."""

    changes: Mapping[str, Change]
    title: Mapping[str, Any]

    @classmethod
    def of(cls, changes: Mapping[str, Change], plan: Plan, adapter: Adapter) -> MergeReport:
        ordered = {move.spec.name: changes[move.spec.name] for move in plan.moves if move.spec.name in changes}
        lora = adapter.meta.lora
        title = {"adapter": str(adapter.folder), "r": lora.r, "alpha": lora.alpha, "dtype": plan.config.params_dtype}
        return cls(ordered, title)

    @property
    def largest(self) -> float:
        """Greatest change of any weight."""
        return max((change.largest for change in self.changes.values()), default=0.0)

    def table(self) -> str:
        """One line per layer, all of its linears together."""
        layers: dict[str, Change] = {}
        for name, change in self.changes.items():
            layer = name.split(".self_attention.")[0].split(".mlp.")[0].rpartition(".")[2]
            layers.setdefault(layer, Change()).add(change)
        rows = [_HEAD, *((layer, *(f"{value:.3g}" for value in _row(layers[layer]).values())) for layer in layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = ["  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        document = {**self.title, "weights": {name: _row(change) for name, change in self.changes.items()}}
        with replacing_file(path) as temporary:
            temporary.write_text(to_json(document, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def _row(change: Change) -> dict[str, float]:
    """Sizes are root mean squares; rounding is that of the result, against fp64."""
    return {
        "max_change": change.largest,
        "update_over_weight": _ratio(change.update, change.weight),
        "max_rounding": change.worst_rounding,
        "rounding_over_update": _ratio(change.lost, change.update),
    }


def _ratio(a: float, b: float) -> float:
    return math.sqrt(a / b) if b else 0.0
