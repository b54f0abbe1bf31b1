"""The rule for adapters of every format: what the settings name is there, finite and in its shape, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import torch

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.dtypes import DTYPES
from modellink_lora.checkpoint.names import TARGETS
from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families import family_of
from modellink_lora.models.layouts import Replicated, Vocab
from modellink_lora.models.shapes import full_shape

_MOST = 10_000  # layers, and experts of a layer: more is a damaged number


def check_adapter(adapter: Adapter) -> Adapter:
    """`adapter` with a warning where it changes nothing. Every tensor is read once.

    Raises UserError when tensors are missing, foreign, of another shape or dtype, or hold nan or inf.
    """
    where, lora, model = str(adapter.folder), adapter.meta.lora, adapter.meta.model
    if strange := [name for name in lora.target_modules if name not in TARGETS]:
        raise UserError(f"{where}: its settings name {strange[0]!r}, which is none of {' '.join(TARGETS)}")
    if not lora.target_modules:
        raise UserError(f"{where}: its settings name no linear to adapt")
    if not adapter.shapes:
        raise UserError(f"{where}: holds no LoRA factors, its settings name those of {' '.join(lora.target_modules)}")
    if max(model.num_layers, model.num_experts) > _MOST:  # their names would take minutes to make
        raise UserError(f"{where}: its settings say {model.num_layers} layers and {model.num_experts} experts")
    _check_names(adapter, factor_shapes(model, lora), where)
    _check_patterns(adapter, where)
    _check_blocks(adapter, where)
    adds = _check_values(adapter, where)
    if adds:
        return adapter
    line = f"{where}: every lora_B is zero, as before training: the adapter changes nothing"
    return dataclasses.replace(adapter, warnings=(*adapter.warnings, line))


def factor_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Global name -> full shape of every factor that `lora` gives a model of these dimensions."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in family_of(model.hf_model_type).tensors(model):
        module, _, leaf = spec.name.rpartition(".")
        if leaf == "weight" and module.rsplit(".", 1)[-1] in lora.target_modules:
            rows, columns = full_shape(spec.name, model)
            r = lora.rank_of(module)
            shapes |= {f"{module}.lora_A": (r, columns), f"{module}.lora_B": (rows, r)}
    return shapes


def _check_names(adapter: Adapter, expected: dict[str, tuple[int, ...]], where: str) -> None:
    found = adapter.shapes
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    for name in missing:
        module, _, factor = name.rpartition(".")
        other = "lora_B" if factor == "lora_A" else "lora_A"
        if f"{module}.{other}" in found:
            raise UserError(f"{where}: {module} has only one factor: {other} is there, {factor} is missing")
    if missing:
        also = f", and holds {foreign[0]}, which they do not name" if foreign else ""
        raise UserError(f"{where}: lacks {missing[0]} and {len(missing) - 1} other of the {len(expected)} factors that "
                        f"its settings name ({' '.join(adapter.meta.lora.target_modules)} in "
                        f"{adapter.meta.model.num_layers} layers){also}")  # fmt: skip
    if foreign:
        raise UserError(f"{where}: holds {foreign[0]}, which its settings do not name "
                        f"({' '.join(adapter.meta.lora.target_modules)} in {adapter.meta.model.num_layers} layers of a "
                        f"{adapter.meta.model.hf_model_type} model)")  # fmt: skip
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{where}: {name} is {tuple(found[name])}, its settings (rank and dimensions of the base) "
                            f"make it {shape}")  # fmt: skip


def _check_patterns(adapter: Adapter, where: str) -> None:
    lora = adapter.meta.lora
    for key in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(f".{module}".endswith(f".{key}") for module in adapter.modules):
            raise UserError(f"{where}: rank_pattern/alpha_pattern {key} matches no adapted linear")


def _check_blocks(adapter: Adapter, where: str) -> None:
    """What is kept of PEFT's projections fits the fused factors."""
    if adapter.meta.peft is None:
        return
    blocks = adapter.meta.peft.blocks
    if odd := sorted(blocks.keys() ^ set(adapter.modules)):
        raise UserError(f"{where}: peft.blocks and the adapted linears differ in {odd[0]}")
    for module, parts in blocks.items():
        if len(parts) != len(adapter.projections(module)):
            raise UserError(f"{where}: peft.blocks of {module} has {len(parts)} entries for "
                            f"{len(adapter.projections(module))} projections")  # fmt: skip
        for block in filter(None, parts):
            end = block.start + block.r
            if not (0 <= block.start < end <= adapter.meta.lora.rank_of(module)) or not {*block.dtypes} <= {*DTYPES}:
                raise UserError(f"{where}: peft.blocks of {module} has a part from row {block.start} of rank {block.r} "
                                f"and dtypes {' '.join(block.dtypes)}, which does not lie in its factors")  # fmt: skip
            if not (math.isfinite(block.alpha) and block.alpha > 0):
                raise UserError(f"{where}: peft.blocks of {module} has alpha {block.alpha}, which is not above 0")


def _check_values(adapter: Adapter, where: str) -> bool:
    """Whether any lora_B is not zero."""
    adds = False
    for name in adapter.shapes:
        tensor = adapter.stored(name)
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{where}: {name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds nan or inf: the run that wrote it diverged, take an earlier "
                            "checkpoint")  # fmt: skip
        adds = adds or (name.endswith("lora_B") and bool(tensor.any()))
    if not adapter.replaced:
        return adds
    model = adapter.meta.model
    specs = {spec.name: spec for spec in family_of(model.hf_model_type).tensors(model)}
    for name in adapter.replaced:
        if name not in specs or adapter.meta.peft is None or type(specs[name].layout) not in (Vocab, Replicated):
            raise UserError(f"{where}: holds {name}, which is no LoRA factor and which its settings do not name")
        tensor, shape = adapter.stored(name), full_shape(name, model)
        if tuple(specs[name].layout.split(torch.empty(shape, device="meta"))[0].shape) != tuple(tensor.shape):
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, the base's is {tuple(shape)}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds nan or inf, or is of {tensor.dtype}")
    return True
