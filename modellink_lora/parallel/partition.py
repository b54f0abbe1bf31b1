"""Layers over pipeline stages: which global layer is which local layer. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modellink_lora.config.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Consecutive layers over `len(counts)` pipeline stages; stage p holds `counts[p]` layers."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, num_layers: int, stages: int, layer_list: Sequence[int] | None = None) -> Partition:
        """Split `num_layers` evenly, or as `layer_list` says. Raises UserError when that is impossible."""
        if layer_list is not None:
            given = ",".join(map(str, layer_list))
            if len(layer_list) != stages:
                raise UserError(f"--num-layer-list {given} names {len(layer_list)} stages, the layout has {stages}")
            if sum(layer_list) != num_layers:
                raise UserError(
                    f"--num-layer-list {given} sums to {sum(layer_list)}, the model has {num_layers} layers"
                )
            return cls(tuple(layer_list))
        if num_layers % stages:
            low = num_layers // stages
            example = ",".join(str(low + (p < num_layers % stages)) for p in range(stages))
            raise UserError(
                f"{num_layers} layers do not divide over {stages} pipeline stages: say how, "
                f"e.g. --num-layer-list {example}"
            )
        return cls((num_layers // stages,) * stages)

    @property
    def stages(self) -> int:
        return len(self.counts)

    def layers(self, stage: int) -> range:
        """Global indices of the layers of `stage`."""
        start = sum(self.counts[:stage])
        return range(start, start + self.counts[stage])

    def to_global(self, name: str, stage: int) -> str:
        """`decoder.layers.<local>.…` of `stage` -> the name with the global layer index."""
        return _renumber(name, self.layers(stage).start)

    def to_local(self, name: str, stage: int) -> str:
        """The inverse of `to_global`."""
        return _renumber(name, -self.layers(stage).start)

    def holds(self, name: str, stage: int) -> bool:
        """Whether the tensor of this global name belongs to `stage`; a tied output layer is the embedding's copy."""
        head, _, rest = name.partition("decoder.layers.")
        if not head and rest:
            return int(rest.split(".", 1)[0]) in self.layers(stage)
        return stage == (0 if name.startswith("embedding.") else self.stages - 1)


def _renumber(name: str, shift: int) -> str:
    prefix, mark, rest = name.partition("decoder.layers.")
    if not mark:
        return name
    index, dot, tail = rest.partition(".")
    return f"{prefix}{mark}{int(index) + shift}{dot}{tail}"
