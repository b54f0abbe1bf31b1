"""Layers over pipeline stages: which global layer is which local layer. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modellink_lora.config.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Consecutive layers over pipeline stages, each of which holds `chunks` separate runs of layers.

    `counts` are the layers of each run in the model's order. Run k is chunk k // stages of stage k % stages: with 2
    stages and 2 chunks, stage 0 holds runs 0 and 2, stage 1 runs 1 and 3 (Megatron's interleaved schedule,
    arXiv:2104.04473, section 2.2). One chunk a stage is the plain pipeline.
    """

    counts: tuple[int, ...]
    chunks: int = 1

    @classmethod
    def of(
        cls, num_layers: int, stages: int, layer_list: Sequence[int] | None = None, per_chunk: int | None = None
    ) -> Partition:
        """Split `num_layers` evenly, or as `layer_list` says, or into chunks of `per_chunk` layers.

        Raises UserError when that is impossible.
        """
        if layer_list is not None:
            given = ",".join(map(str, layer_list))
            if per_chunk:
                raise UserError(
                    "--num-layer-list and --num-layers-per-virtual-pipeline-stage exclude each other: choose one"
                )
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
        held = num_layers // stages
        if not per_chunk:
            return cls((held,) * stages)
        if stages == 1:
            raise UserError(
                "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1: it interleaves "
                "the layers of several stages"
            )
        if held % per_chunk:
            raise UserError(
                f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {held} layers of a stage "
                f"({num_layers} layers over {stages} stages)"
            )
        return cls((per_chunk,) * (num_layers // per_chunk), held // per_chunk)

    @property
    def stages(self) -> int:
        return len(self.counts) // self.chunks

    def layers(self, stage: int, chunk: int = 0) -> range:
        """Global indices of the layers of one chunk of `stage`."""
        run = chunk * self.stages + stage
        start = sum(self.counts[:run])
        return range(start, start + self.counts[run])

    def layers_of_stage(self, stage: int) -> int:
        """Layers of all chunks of `stage`."""
        return sum(len(self.layers(stage, chunk)) for chunk in range(self.chunks))

    def to_global(self, name: str, stage: int, chunk: int = 0) -> str:
        """`decoder.layers.<local>.…` of a chunk -> the name with the global layer index."""
        return _renumber(name, self.layers(stage, chunk).start)

    def to_local(self, name: str, stage: int, chunk: int = 0) -> str:
        """The inverse of `to_global`."""
        return _renumber(name, -self.layers(stage, chunk).start)

    def holds(self, name: str, stage: int, chunk: int = 0) -> bool:
        """Whether the tensor of this global name belongs there; a tied output layer is the embedding's copy."""
        head, _, rest = name.partition("decoder.layers.")
        if not head and rest:
            return int(rest.split(".", 1)[0]) in self.layers(stage, chunk)
        run = chunk * self.stages + stage
        return run == (0 if name.startswith("embedding.") else len(self.counts) - 1)

    def describe(self) -> str:
        """Layers of each stage, e.g. "3,2" or, interleaved, "2x1,2x1"."""
        if self.chunks == 1:
            return ",".join(map(str, self.counts))
        return ",".join(f"{self.chunks}x{self.counts[0]}" for _ in range(self.stages))


def _renumber(name: str, shift: int) -> str:
    prefix, mark, rest = name.partition("decoder.layers.")
    if not mark:
        return name
    index, dot, tail = rest.partition(".")
    return f"{prefix}{mark}{int(index) + shift}{dot}{tail}"
