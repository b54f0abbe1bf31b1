"""Carrying out a conversion: read a tensor, fold in its adapter, bring it into the target's form, write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modellink_lora.adapters.merge import merge
from modellink_lora.checkpoint import dtypes
from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.hf import read_config_json, write_hf_folder
from modellink_lora.checkpoint.rank_files import write_rank_files
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.adapters import export_adapter
from modellink_lora.convert.plan import Plan, adapted_ranks, check_layout, make_plan, padded
from modellink_lora.convert.sources import Source, check_base, open_merge, open_source
from modellink_lora.models.layouts import Vocab, lora_layouts
from modellink_lora.parallel.partition import Partition

HF_OUTPUT = "mg2hg"  # folder below --save-dir that scripts expect
_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Say = Callable[[str], None]


def run(convert: ConvertConfig, lora_flags: Mapping[str, Any], *, say: Say) -> Path:
    """Do what `convert` says and return the folder written.

    Args:
        lora_flags: LoraConfig fields the user typed; they are compared with the adapter, never used instead.
    """
    if convert.exports_adapter:
        adapter = open_merge(convert, lora_flags, (lambda: open_source(convert).config) if convert.load_dir else None)
        assert adapter is not None
        return export_adapter(convert, adapter, say)
    source = open_source(convert)
    notes = list(source.notes)
    if source.files and source.files.holds_adapter:
        if convert.lora_load is None:
            convert = dataclasses.replace(convert, lora_load=convert.load_dir)
            notes.append(f"{convert.load_dir} holds a base and an adapter: the adapter is merged")
        elif Path(convert.lora_load).resolve() != source.files.root.resolve():
            notes.append(f"{convert.load_dir} holds an adapter beside the base: not used, {convert.lora_load} is")
    adapter = open_merge(convert, lora_flags, lambda: source.config)
    _check_places(convert)
    for note in [*notes, *(adapter.notes if adapter else ())]:
        say(f"note: {note}")
    ranks: dict[str, int] = {}
    if adapter:
        ranks = adapted_ranks(
            source.family, source.config, adapter.meta.lora, adapter.shapes, where=f"--lora-load {convert.lora_load}"
        )
        for note in check_base(source, adapter, convert):
            say(f"warning: {note}")
    plan = _plan(convert, source, ranks)
    say(plan.table())
    companions = source.companions(convert)
    if convert.target == "hf" and companions is None:
        raise UserError(
            f"no config.json in {convert.load_dir}/hf or {convert.save_dir}: put the config.json and tokenizer files "
            "of the original Hugging Face model into --save-dir"
        )
    if convert.dry_run:
        say("dry run: nothing was written")
        return Path(convert.save_dir)
    result = _Result(source, adapter, plan)
    if convert.target == "hf":
        assert companions is not None
        folder = _write_hf(convert, plan, result.read, companions)
    else:
        folder = write_rank_files(
            Path(convert.save_dir),
            config=plan.config,
            tp=plan.tp,
            partition=plan.partition,
            spelling="legacy" if _spelling(convert, source) == "legacy" else "mcore",
            dtype=plan.dtype,
            read=result.read,
            read_shard=result.read_shard,
            iteration=source.files.iteration if source.files else 1,
            hf_files=companions,
        )
    if adapter:
        largest = max(result.changes)
        say(f"merged {convert.lora_load} into {len(ranks)} linears; largest change of a weight {largest:.3g}")
    say(f"wrote {folder}")
    return folder


def _plan(convert: ConvertConfig, source: Source, ranks: Mapping[str, int]) -> Plan:
    """The result's layout: what flags ask for, else one process, or the source's with the older spelling."""
    keep = source.files if convert.keeps_layout else None
    tp = convert.target_tensor_parallel_size or (keep.tp if keep else 1)
    stages = convert.target_pipeline_parallel_size or (keep.partition.stages if keep else 1)
    if keep and convert.target_pipeline_parallel_size is None and convert.layer_list is None:
        partition = keep.partition if keep.partition.chunks == 1 else Partition.of(source.config.num_layers, stages)
    else:
        partition = Partition.of(source.config.num_layers, stages, convert.layer_list)
    if convert.target == "hf":
        tp, partition = 1, Partition.of(source.config.num_layers, 1)
        config = dataclasses.replace(source.config, padded_vocab_size=source.config.vocab_size)
        where = f"{convert.save_dir}/{HF_OUTPUT}"
    else:
        config = padded(source.config, tp, convert.make_vocab_size_divisible_by)
        where = f"{convert.save_dir} ({_spelling(convert, source)} names)"
    check_layout(config, tp)
    dtype = dtypes.DTYPES[convert.params_dtype] if convert.params_dtype else source.dtype
    config = dataclasses.replace(config, params_dtype=dtypes.dtype_name(dtype, where="--params-dtype"))
    title = f"{source.family.hf_model_types[0]} model: {convert.load_dir} -> {where}"
    return make_plan(title, source.family, config, dtype=dtype, tp=tp, partition=partition, ranks=ranks)


def _spelling(convert: ConvertConfig, source: Source) -> str:
    return convert.spelling(source.files.spelling if source.files else None)


@dataclasses.dataclass(frozen=True)
class _Result:
    """The tensors of the result: merged, padded for the target, in its dtype."""

    source: Source
    adapter: Adapter | None
    plan: Plan
    changes: list[float] = dataclasses.field(default_factory=list)  # greatest |change| of each merged weight

    def read(self, name: str) -> Tensor:
        """The full tensor of global name `name`."""
        return self.read_shard(name, 0, 1)

    def read_shard(self, name: str, rank: int, size: int) -> Tensor:
        """One shard. Shards are merged on their own, which gives the same bits and does no work twice."""
        move = self.plan.move(name)
        layout = move.spec.layout
        full = self.source.read(name)
        if isinstance(layout, Vocab) and full.shape[0] != layout.padded:
            full = layout.fuse([full])
        weight = layout.shard(full, rank, size)
        if move.rank is None or self.adapter is None:
            return dtypes.convert(weight, self.plan.dtype, name=name)
        a_layout, b_layout = lora_layouts(layout)
        a = a_layout.shard(self.adapter.read(f"{move.module}.lora_A"), rank, size)
        b = b_layout.shard(self.adapter.read(f"{move.module}.lora_B"), rank, size)
        try:
            merged = merge(weight, a, b, self.adapter.meta.lora.scaling_of(move.module), dtype=self.plan.dtype)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        self.changes.append((merged.float() - weight.float()).abs().max().item())
        return merged


def _write_hf(convert: ConvertConfig, plan: Plan, read: Callable[[str], Tensor], companions: Path) -> Path:
    """A Hugging Face folder below `--save-dir`, its config.json saying the dtype written."""
    config = read_config_json(companions, flag="--save-dir")
    key = "torch_dtype" if "torch_dtype" in config or "dtype" not in config else "dtype"
    config[key] = _HF_DTYPES[plan.config.params_dtype]
    folder = Path(convert.save_dir) / HF_OUTPUT

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for move in plan.moves:
            yield from zip(move.spec.hf, move.spec.layout.split(read(move.spec.name)), strict=True)

    expected = [part for move in plan.moves for part in move.spec.hf]
    write_hf_folder(folder, tensors(), expected=expected, config=config, companions=companions)
    return folder


def _check_places(convert: ConvertConfig) -> None:
    """Writing a checkpoint over what is being read would destroy it."""
    if convert.target != "mg":
        return
    save = Path(convert.save_dir).resolve()
    for name, given in (("--load-dir", convert.load_dir), ("--lora-load", convert.lora_load)):
        if given and Path(given).resolve() == save:
            raise UserError(f"--save-dir {convert.save_dir} is also {name}: choose another folder for the result")
