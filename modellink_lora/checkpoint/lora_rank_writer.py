"""An adapter alone as Megatron rank files with the keys that ModelLink's training saves, cut for any layout.

Those files have one rank and one alpha for all linears. Smaller ranks are filled up with zeros, and a linear of another
scaling has the ratio multiplied into its lora_B: the same function. What that changes is kept beside the model, where
other programs do not look, so that reading here gives the adapter back bit for bit. Letters: r a linear's own rank, R
the common one, t tensor parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modellink_lora.checkpoint import megatron_args
from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.blocks import scaled_b
from modellink_lora.checkpoint.dtypes import DTYPES
from modellink_lora.checkpoint.names import TARGETS, to_legacy
from modellink_lora.checkpoint.rank_tree import SIDECAR, Spelling, check_spelling, rank_file
from modellink_lora.checkpoint.store import iteration_folder, pointing_at, replacing_folder
from modellink_lora.config.document import to_json
from modellink_lora.config.errors import UserError
from modellink_lora.models.layouts import Replicated, lora_layouts
from modellink_lora.parallel.partition import Partition


def write_lora_rank_files(root: Path, adapter: Adapter, *, tp: int, partition: Partition, spelling: Spelling) -> Path:
    """Write `adapter` below `root` and point the tracker at it; the folder of its iteration.

    Raises:
        UserError: heads, groups or widths do not divide over `tp`.
    """
    meta, iteration = adapter.meta, adapter.meta.iteration
    _check_divides(adapter, tp)
    check_spelling(meta.model, spelling)
    r, alpha = common(adapter)
    dtype = DTYPES[meta.lora.dtype or meta.model.params_dtype]
    args = megatron_args.namespace(
        meta.model, tp=tp, partition=partition, legacy=spelling == "legacy", dtype=dtype, iteration=iteration
    )
    vars(args).update(_lora_args(adapter, r, alpha, partition, spelling))
    folder = iteration_folder(root, iteration)
    names = [f"{module}.{factor}" for module in adapter.modules for factor in ("lora_A", "lora_B")]
    with (
        pointing_at(root, iteration),
        replacing_folder(folder) as temporary,
        tqdm(total=tp * len(names), desc=f"writing {folder}") as bar,
    ):
        for stage in range(partition.stages):
            for rank in range(tp):
                document = _document(
                    adapter, names, stage, rank, tp=tp, partition=partition, spelling=spelling, bar=bar
                )
                path = rank_file(temporary, rank, stage, partition.stages)
                path.parent.mkdir()
                torch.save({"args": args, "checkpoint_version": 3.0, "iteration": iteration, **document}, path)
    return folder


def common(adapter: Adapter) -> tuple[int, float]:
    """The one rank of such files, and the alpha that makes their scaling alpha / R that of the first linear."""
    lora = adapter.meta.lora
    r = max(lora.rank_of(module) for module in adapter.modules)
    return r, lora.scaling_of(adapter.modules[0]) * r


def factors_of(adapter: Adapter, module: str, scaling: float) -> list[float]:
    """By what the B in such files differs from `Adapter.stored`, for each projection; 1 where it is the same."""
    parts = adapter.ratios(module) or [1.0] * len(adapter.projections(module))
    whole = adapter.meta.lora.scaling_of(module) / scaling
    return [1.0 if math.isclose(part * whole, 1.0, rel_tol=1e-12) else part * whole for part in parts]


def _document(
    adapter: Adapter, names: list[str], stage: int, rank: int, *, tp: int, partition: Partition, spelling: Spelling,
    bar: Any,
) -> dict[str, Any]:  # fmt: skip
    """`model`, or `model0`, `model1`, ... of one rank, and what is kept beside it."""
    r, alpha = common(adapter)
    models: list[dict[str, Any]] = [{} for _ in range(partition.chunks)]
    exact: dict[str, Tensor] = {}
    for name in names:
        module, _, factor = name.rpartition(".")
        for chunk, model in enumerate(models):
            if not partition.holds(name, stage, chunk):
                continue
            stored = adapter.stored(name)
            layout = lora_layouts(adapter.layout(module))[factor == "lora_B"]
            if factor == "lora_A":
                common_rank = torch.cat([stored, stored.new_zeros(r - stored.shape[0], stored.shape[1])])  # [R, in]
            else:
                scaled = scaled_b(stored, adapter.layout(module), factors_of(adapter, module, alpha / r))
                common_rank = torch.cat([scaled, scaled.new_zeros(scaled.shape[0], r - scaled.shape[1])], 1)  # [out, R]
                if scaled is not stored:
                    exact[name] = _own(layout.shard(stored, rank, tp))
            local = partition.to_local(f"{name}.default", stage, chunk)
            _put(model, f"{local}.weight", _own(layout.shard(common_rank, rank, tp)), spelling)
            if type(layout) is not Replicated:  # a parallel linear of Megatron's, which has this entry
                _put(model, f"{local}._extra_state", None, spelling)
            bar.update()
    sidecar = {"adapter": to_json(adapter.meta.to_json(), ensure_ascii=True), "stored": exact}
    return {**{"model" if len(models) == 1 else f"model{n}": m for n, m in enumerate(models)}, SIDECAR: sidecar}


def _own(shard: Tensor) -> Tensor:
    """A copy: a view would drag its whole storage into the file."""
    return shard.clone(memory_format=torch.contiguous_format)


def _put(model: dict[str, Any], name: str, value: Tensor | None, spelling: Spelling) -> None:
    path = (name,) if spelling == "mcore" else to_legacy(name, tied=False)
    for key in path[:-1]:
        model = model.setdefault(key, {})
    model[path[-1]] = value


def _lora_args(adapter: Adapter, r: int, alpha: float, partition: Partition, spelling: Spelling) -> Mapping[str, Any]:
    targets = adapter.meta.lora.target_modules
    return {
        "lora_r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_target_modules": [TARGETS[name] if spelling == "legacy" else name for name in targets],
        "lora_load": None,
        "virtual_pipeline_model_parallel_size": partition.chunks if partition.chunks > 1 else None,
        "num_layers_per_virtual_pipeline_stage": partition.counts[0] if partition.chunks > 1 else None,
    }


def _check_divides(adapter: Adapter, tp: int) -> None:
    config = adapter.meta.model
    for what, size in config.widths_cut_by_tp.items():
        if size % tp:
            raise UserError(f"--target-tensor-parallel-size {tp} does not divide the {size} {what} of this model")
