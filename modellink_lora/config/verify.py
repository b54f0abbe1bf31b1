"""What `verify` is told besides the flags of training, and the layouts it compares with each other."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from modellink_lora.config.errors import UserError
from modellink_lora.config.flag import check_ranges, flag
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig

_FIELDS = {
    "tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
    "vpp": "num_layers_per_virtual_pipeline_stage",
}  # fmt: skip


@dataclass(frozen=True)
class VerifyConfig:
    """Verification"""

    verify_steps: int = flag(3, "steps at every layout", at_least=1)
    against: tuple[str, ...] = flag(
        (),
        "layouts to compare with, such as tp2,sp or pp2,vpp1 (vpp: layers per virtual stage) or dp; "
        "default those that the processes allow",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self.layouts()

    def layouts(self) -> list[ParallelConfig]:
        """Those of `--against`."""
        return [_parse(text) for text in self.against]


def _parse(text: str) -> ParallelConfig:
    """`"tp2,sp,pp2"` -> the layout; what is left of the processes is data parallel."""
    fields: dict[str, int | bool] = {}
    for word in text.split(","):
        match = re.fullmatch(r"(tp|pp|vpp)([1-9]\d*)", word)
        if match:
            fields[_FIELDS[match[1]]] = int(match[2])
        elif word == "sp":
            fields["sequence_parallel"] = True
        elif word != "dp":
            raise UserError(f"--against {text}: {word!r} is none of tpN, sp, ppN, vppN, dp; give e.g. tp2,sp or pp2")
    return ParallelConfig(**fields)  # type: ignore[arg-type]


def layout_name(parallel: ParallelConfig, processes: int) -> str:
    """The layout as `--against` takes it, e.g. "tp2,sp,pp2"; "dp" where nothing is shared out but samples."""
    words = [f"{word}{getattr(parallel, name)}" for word, name in _FIELDS.items() if (getattr(parallel, name) or 1) > 1
             or (word == "vpp" and getattr(parallel, name))]  # fmt: skip
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        words.insert(1, "sp")
    return ",".join(words) or ("dp" if processes > 1 else "one process")


def other_layouts(own: ParallelConfig, processes: int, model: ModelConfig) -> list[ParallelConfig]:
    """Layouts of the same processes that this model allows: each kind of parallelism at its most, then mixed."""
    divisors = [n for n in range(1, processes + 1) if processes % n == 0]
    shared = model.widths_cut_by_tp.values()
    tensor = max(n for n in divisors if all(size % n == 0 for size in shared))
    stages = max(n for n in divisors if n <= model.num_layers)
    found = [ParallelConfig(), ParallelConfig(tensor), ParallelConfig(tensor, sequence_parallel=True)]
    found.append(_pipeline(stages, model.num_layers))
    if stages > 1 and model.num_layers % (2 * stages) == 0:
        per_chunk = model.num_layers // (2 * stages)
        found.append(ParallelConfig(1, stages, num_layers_per_virtual_pipeline_stage=per_chunk))
    if processes % 4 == 0 and tensor % 2 == 0 and stages % 2 == 0:
        found.append(dataclasses.replace(_pipeline(2, model.num_layers), tensor_model_parallel_size=2))
    found.append(dataclasses.replace(own, sequence_parallel=not own.sequence_parallel))
    if model.num_experts:  # whose tensor ranks must share out the sequence too
        found = [layout for layout in found if layout.tensor_model_parallel_size == 1 or layout.sequence_parallel]
    distinct = {layout_name(layout, processes): layout for layout in found}
    distinct.pop(layout_name(own, processes), None)
    return list(distinct.values())


def _pipeline(stages: int, layers: int) -> ParallelConfig:
    counts = None
    if layers % stages:
        counts = ",".join(str(layers // stages + (stage < layers % stages)) for stage in range(stages))
    return ParallelConfig(1, stages, num_layer_list=counts)
