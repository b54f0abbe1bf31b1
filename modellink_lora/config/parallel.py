"""How a run is laid out over processes: tensor, sequence, pipeline and data parallel sizes."""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag
from modellink_lora.config.model import ModelConfig


def parse_layer_list(text: str) -> tuple[int, ...]:
    """`"6,8,8,10"` -> (6, 8, 8, 10), the layers of each pipeline stage."""
    try:
        if not text.isascii() or "_" in text:
            raise ValueError
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--num-layer-list {text!r} is not a comma list of whole numbers such as 6,8,8,10") from None
    if any(count < 1 for count in counts):
        raise UserError(f"--num-layer-list {text!r}: every pipeline stage needs at least one layer")
    return counts


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout"""

    tensor_model_parallel_size: int = flag(1, "processes that share one layer's matrices", at_least=1)
    pipeline_model_parallel_size: int = flag(1, "pipeline stages", at_least=1)
    sequence_parallel: bool = flag(False, "split norms and residuals along the sequence; off when TP is 1")
    num_layer_list: str | None = flag(None, "layers of each pipeline stage, e.g. 6,8,8,10; must sum to the layer count")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None,
        "interleave the stages in runs of this many layers, which shortens the pipeline's bubble",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in `world_size` processes. Raises UserError when they do not divide."""
        if world_size % self.model_parallel_size:
            raise UserError(
                f"{world_size} processes cannot hold --tensor-model-parallel-size {self.tensor_model_parallel_size} x "
                f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size}: start a multiple of "
                f"{self.model_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError when this layout cannot hold `model`."""
        tp = self.tensor_model_parallel_size
        widths = model.widths_cut_by_tp
        for what, size in {**widths, "padded vocabulary rows": model.padded_vocab_size}.items():
            if size % tp:
                divisors = [d for d in range(1, 65) if all(width % d == 0 for width in widths.values())]
                raise UserError(
                    f"--tensor-model-parallel-size {tp} does not divide the {size} {what} of this model; "
                    f"heads, groups and ffn allow {', '.join(map(str, divisors))}"
                    + (
                        "; leave --padded-vocab-size out and rows are added as needed"
                        if what.startswith("padded")
                        else ""
                    )
                )
