"""Carrying out a conversion: open, plan, write tensor by tensor, verify, report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modellink_lora.checkpoint import dtypes
from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.filling import Job, Tick, ticking
from modellink_lora.checkpoint.hf import Write, read_config_json, write_hf_folder
from modellink_lora.checkpoint.meta import MetaLayout
from modellink_lora.checkpoint.outfile import Slot
from modellink_lora.checkpoint.rank_tree import Spelling, check_spelling, rank_file
from modellink_lora.checkpoint.rank_writer import RankLayout, write_rank_files
from modellink_lora.checkpoint.store import TRACKER, iteration_folder, writing
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.adapters import export_adapter
from modellink_lora.convert.endings import Taught, fit_endings, tell_stop
from modellink_lora.convert.meta import meta_notes, meta_taken, meta_tokenizer, write_meta_folder
from modellink_lora.convert.plan import Move, Plan, adapted_ranks, check_layout, job_memory, make_plan, padded, size
from modellink_lora.convert.report import MergeReport
from modellink_lora.convert.sources import Source, check_base, open_merge, open_source
from modellink_lora.convert.transfer import Transfer
from modellink_lora.convert.verify import verify
from modellink_lora.models.shapes import kinds_of
from modellink_lora.parallel.partition import Partition

HF_OUTPUT, HF_OUTPUT_LINK = "mg2hg", "mg2hf"  # folder below --save-dir that scripts expect, and its other name
_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Say = Callable[[str], None]


def run(convert: ConvertConfig, lora_flags: Mapping[str, Any], *, say: Say) -> Path:
    """Do what `convert` says and return the folder written.

    Args:
        lora_flags: LoraConfig fields the user typed; they are compared with the adapter, never used instead.
    """
    for name, reason in convert.without_effect.items():
        say(f"{name} has no effect: {reason}")
    if convert.exports_adapter:
        adapter = open_merge(convert, lora_flags, (lambda: open_source(convert).config) if convert.load_dir else None)
        assert adapter is not None
        if convert.load_dir and adapter.meta.base_fingerprint is not None:
            check_base(open_source(convert), adapter, convert)
        with told_when_full(Path(convert.save_dir)):
            return export_adapter(convert, adapter, say)
    source = open_source(convert)
    notes = list(source.notes)
    if convert.params_dtype is None:
        notes.append(f"the result is {_dtypes_read(source)} like the weights read; --params-dtype would change that")
    padding = source.config.padded_vocab_size - source.config.vocab_size
    if source.files and padding and convert.target != "mg":
        notes.append(f"{padding} rows behind the {source.config.vocab_size} of the vocabulary are padding: left out")
    if source.files and source.files.holds_adapter:
        if convert.lora_load is None:
            convert = dataclasses.replace(convert, lora_load=convert.load_dir)
            notes.append(f"{convert.load_dir} holds a base and an adapter: the adapter is merged")
        elif Path(convert.lora_load).resolve() != source.files.root.resolve():
            notes.append(f"{convert.load_dir} holds an adapter beside the base: not used, {convert.lora_load} is")
    if convert.target == "mg" and not source.is_known(convert):
        notes.append(
            f"{convert.load_dir} does not tell its vocabulary and rotary settings for certain, and the result will not "
            "either: give them by flags as before, or put the model's config.json into --save-dir and convert again"
        )
    adapter = open_merge(convert, lora_flags, lambda: source.config)
    if convert.verify_logits is not None and adapter is None:
        raise UserError(
            "--verify-logits compares base + adapter with the merged model: name the adapter by --lora-load"
        )
    _check_places(convert)
    for note in [*notes, *(adapter.notes if adapter else ())]:
        say(f"note: {note}")
    for warning in adapter.warnings if adapter else ():
        say(f"warning: {warning}")
    ranks: dict[str, int] = {}
    if adapter:
        ranks = adapted_ranks(
            source.family, source.config, adapter.meta.lora, adapter.shapes, where=f"--lora-load {convert.lora_load}"
        )
        for note in check_base(source, adapter, convert):
            say(f"warning: {note}")
    plan = _plan(convert, source, ranks)
    if source.inventory:
        source.inventory.check(move.spec.name for move in plan.moves)
    say(plan.table())
    for line in _rounded(plan, source, adapter):
        say(f"warning: {line}")
    if convert.list_moves:
        say(plan.every_move())
    companions = source.companions(convert)
    if convert.target == "hf" and companions is None:
        raise UserError(
            f"no config.json in {convert.load_dir}/hf or {convert.save_dir}: put the config.json and tokenizer files "
            "of the original Hugging Face model into --save-dir"
        )
    if convert.target == "meta":
        for note in meta_notes(plan, meta_tokenizer(companions)):
            say(f"note: {note}")
        ending = Taught()
        tell_stop(
            convert, adapter, companions, say, how="Meta's format cannot say it, give it to the code that runs it"
        )
    else:
        ending = fit_endings(convert, adapter, companions, say)
    say(check_space(Path(convert.save_dir), plan.total_bytes))
    if convert.dry_run:
        say("dry run: nothing was written")
        return Path(convert.save_dir)
    transfer = Transfer(source.under(adapter), adapter)
    save = Path(convert.save_dir)
    with writing(save, flag="--save-dir", tell=say), told_when_full(save), ending.beside(companions) as companions:
        _check_free(convert, source)
        begin, written = time.perf_counter(), []

        def check(temporary: Path) -> None:
            written.append(time.perf_counter())
            if convert.verify:
                say(verify(temporary, plan, transfer, spelling=_spelling(convert, source)))

        if convert.target == "hf" and companions is not None:
            folder = _write_hf(convert, plan, transfer, companions, check)
        elif convert.target == "meta":
            folder = write_meta_folder(
                save, plan, transfer, tokenizer=meta_tokenizer(companions), workers=_workers(convert), check=check
            )
        else:
            folder = _write_ranks(convert, plan, transfer, source, companions, check)
        seconds = written[0] - begin
        if convert.target == "hf":
            _link_other_name(folder, say)
        if adapter:
            report = MergeReport.of(transfer.changes, plan, adapter)
            path = Path(convert.merge_report or save / "merge_report.json")
            report.write(path)
            say(report.table())
            say(
                f"merged {convert.lora_load} into {len(ranks)} linears; largest change of a weight {report.largest:.3g}"
            )
            say(f"what changed in each weight: {path}")
    say(f"wrote {folder}: {size(plan.total_bytes)} in {seconds:.1f} s, {size(plan.total_bytes / seconds)}/s")
    return folder


def _link_other_name(folder: Path, say: Say) -> None:
    """ModelLink's code says `mg2hf` where its documents say `mg2hg`: scripts that look there find the result too."""
    link = folder.with_name(HF_OUTPUT_LINK)
    if link.exists() and not link.is_symlink():
        say(f"note: {link} is something else and stays as it is; the result is {folder}")
        return
    with contextlib.suppress(OSError):  # some file systems have no links
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)


def check_space(save: Path, needed: int) -> str:
    """One line on what is needed and free where the result goes. Raises UserError where that is too little."""
    place = save.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    # headers, tokenizer files and the file system's own tables come on top
    line = f"{size(needed)} are needed and {size(free)} are free on the disk of --save-dir {save}"
    if free < needed * 1.002 + (1 << 20):
        raise UserError(f"{line}: free some space or choose another disk")
    return line


@contextlib.contextmanager
def told_when_full(save: Path) -> Iterator[None]:
    """Turn a full disk, wherever it is met, into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--save-dir {save}: {error.strerror} while writing; nothing is left of the result: free some space"
            ) from None
        raise


def _check_free(convert: ConvertConfig, source: Source) -> None:
    """Raise UserError where the result would replace another one unasked."""
    if convert.overwrite:
        return
    save = Path(convert.save_dir)
    places: dict[str, list[Path | None]] = {
        "hf": [save / HF_OUTPUT], "meta": [meta_taken(save)],
        "mg": [iteration_folder(save, _iteration(source)), save / TRACKER],
    }  # fmt: skip
    if there := next((place for place in places[convert.target] if place and place.exists()), None):
        raise UserError(f"{there} exists: choose another --save-dir, or replace it by --overwrite")


def _iteration(source: Source) -> int | str:
    return source.files.iteration if source.files else 1


def _workers(convert: ConvertConfig) -> int:
    return convert.workers or min(8, len(os.sched_getaffinity(0)))


def _plan(convert: ConvertConfig, source: Source, ranks: Mapping[str, int]) -> Plan:
    """The result's layout: what flags ask for, else one process, or the source's with the older spelling."""
    keep = source.files if convert.keeps_layout else None
    tp = convert.target_tensor_parallel_size or (keep.tp if keep else 1)
    stages = convert.target_pipeline_parallel_size or (keep.partition.stages if keep else 1)
    ep = convert.target_expert_parallel_size or (keep.ep if keep else 1)
    per_chunk, layers = convert.num_layers_per_virtual_pipeline_stage, source.config.num_layers
    if convert.tells_interleaving:
        per_chunk = None
    given = (convert.target_pipeline_parallel_size, convert.layer_list, per_chunk)
    if keep and not any(given):
        partition = keep.partition
    else:
        partition = Partition.of(layers, stages, convert.layer_list, per_chunk)
    if convert.target in ("hf", "meta"):
        tp, partition, ep = convert.target_tensor_parallel_size or 1, Partition.of(layers, 1), 1
        config = dataclasses.replace(source.config, padded_vocab_size=source.config.vocab_size)
        where = f"{convert.save_dir}/{HF_OUTPUT}" if convert.target == "hf" else f"{convert.save_dir} (Meta's format)"
    else:
        config = padded(source.config, tp, convert.make_vocab_size_divisible_by)
        where = f"{convert.save_dir} ({_spelling(convert, source)} names)"
        check_spelling(config, _spelling(convert, source))
    check_layout(config, tp, ep)
    dtype = dtypes.DTYPES[convert.params_dtype] if convert.params_dtype else source.dtype
    config = dataclasses.replace(config, params_dtype=dtypes.dtype_name(dtype, where="--params-dtype"))
    title = f"{source.family.hf_model_types[0]} model: {convert.load_dir} -> {where}"
    types = {
        spec.name: (dtype,) * len(spec.hf) if convert.params_dtype else source.dtypes(spec)
        for spec in source.family.tensors(config)
    }
    kept = {name: dtypes.widest(found) for name, found in types.items()}
    if convert.target == "meta":
        meta = MetaLayout(config, tp, dtype, kept)
        meta.check()
        total, targets = meta.total_bytes(), meta.places()
    else:
        layout = RankLayout(config, tp, partition, _spelling(convert, source), dtype, ep, kept)
        total, targets = layout.total_bytes(), _rank_targets(layout)
    if convert.target == "hf":
        targets = {spec.name: spec.hf for spec in source.family.tensors(config)}
    plan = make_plan(
        title, source.family, config, dtype=dtype, dtypes=lambda spec: types[spec.name], tp=tp, partition=partition,
        ranks=ranks, targets=lambda spec: targets[spec.name],
        sources=source.inventory.keys if source.inventory else lambda name: (name,),
        dropped=source.inventory.dropped if source.inventory else {}, total_bytes=total, workers=_workers(convert),
        ep=ep,
    )  # fmt: skip
    if convert.target == "hf":
        plan = dataclasses.replace(plan, total_bytes=sum(slot.nbytes for slot in _hf_slots(plan)))
    return plan


def _dtypes_read(source: Source) -> str:
    """`bf16`, or `bf16 (and fp32 for 5 tensors: ...)`."""
    main = dtypes.dtype_name(source.dtype, where=source.family.name)
    others: dict[str, list[str]] = {}
    for spec in source.family.tensors(source.config):
        for name, dtype in zip(spec.hf, source.dtypes(spec), strict=True):
            if dtype != source.dtype:
                others.setdefault(dtypes.dtype_name(dtype, where=name), []).append(name)
    said = "; ".join(f"{dtype} for {kinds_of(names)}" for dtype, names in others.items())
    return f"{main} ({said})" if others else main


def _rounded(plan: Plan, source: Source, adapter: Adapter | None) -> Iterator[str]:
    """What a dtype of the result cannot keep of the dtype read, merged tensors apart: the report measures these."""
    found: dict[str, list[str]] = {}
    for move in plan.moves:
        read = source.dtypes(move.spec)
        if adapter and move.spec.name in adapter.replaced:
            read = (adapter.stored(move.spec.name).dtype,) * len(read)
        for before, after in dict.fromkeys(zip(read, move.dtypes, strict=True)):
            if dtypes.loses(before, after):
                what = f"rounded from {before} to {after}".replace("torch.", "")
                found.setdefault(what, []).append(move.spec.name)
    for what, names in found.items():
        yield f"{what}: {kinds_of(names)}"


def _rank_targets(layout: RankLayout) -> dict[str, tuple[str, ...]]:
    """Global name -> every place of it in the rank files."""
    found: dict[str, tuple[str, ...]] = {}
    stages, ep = layout.partition.stages, layout.ep
    for spec, name, stage, _ in layout.places():
        holders = itertools.product(range(layout.tp), layout.holders(name))
        folders = (rank_file(Path(), rank, stage, stages, expert, ep).parent for rank, expert in holders)
        found[spec.name] = found.get(spec.name, ()) + tuple(f"{folder}/{name}" for folder in folders)
    return found


def _spelling(convert: ConvertConfig, source: Source) -> Spelling:
    return convert.spelling(source.files.spelling if source.files else None)


def _write_hf(
    convert: ConvertConfig, plan: Plan, transfer: Transfer, companions: Path, check: Callable[[Path], None]
) -> Path:
    """A Hugging Face folder below `--save-dir`, its config.json saying the dtype written."""
    config = read_config_json(companions, flag="--save-dir")
    key = "torch_dtype" if "torch_dtype" in config or "dtype" not in config else "dtype"
    config[key] = _HF_DTYPES[plan.config.params_dtype]
    folder = Path(convert.save_dir) / HF_OUTPUT

    def jobs(write: Write) -> list[Job]:
        def job(move: Move) -> Job:
            def run(tick: Tick) -> None:
                for number, name in enumerate(move.spec.hf):
                    write(name, ticking(transfer.part(move, number), tick))

            return Job(run, job_memory(move))

        return [job(move) for move in plan.moves]

    write_hf_folder(
        folder, _hf_slots(plan), jobs, config=config, companions=companions, workers=_workers(convert),
        memory=_workers(convert) * max(map(job_memory, plan.moves)), check=check,
    )  # fmt: skip
    return folder


def _hf_slots(plan: Plan) -> list[Slot]:
    return [
        Slot(name, tuple(part.shape), dtype)
        for move in plan.moves
        for name, part, dtype in zip(
            move.spec.hf, move.spec.layout.split(torch.empty(move.shape, device="meta")), move.dtypes, strict=True
        )
    ]


def _write_ranks(
    convert: ConvertConfig,
    plan: Plan,
    transfer: Transfer,
    source: Source,
    companions: Path | None,
    check: Callable[[Path], None],
) -> Path:
    layout = RankLayout(
        plan.config, plan.tp, plan.partition, _spelling(convert, source), plan.dtype, plan.ep, plan.dtypes
    )
    if not source.is_known(convert):
        config = plan.config
        if source.config.vocab_size == source.config.padded_vocab_size:  # nobody knows how many of them are tokens
            config = dataclasses.replace(config, vocab_size=config.padded_vocab_size)
        layout = dataclasses.replace(layout, complete=False, config=config)
    return write_rank_files(
        Path(convert.save_dir),
        layout,
        lambda name, rank, size: transfer.shard(plan.move(name), rank, size),
        iteration=_iteration(source),
        hf_files=companions,
        workers=_workers(convert),
        memory=_workers(convert) * max(map(job_memory, plan.moves)),
        memory_of=lambda name: job_memory(plan.move(name)),
        check=check,
    )


def _check_places(convert: ConvertConfig) -> None:
    """Writing a checkpoint over what is being read would destroy it."""
    if convert.target != "mg":
        return
    save = Path(convert.save_dir).resolve()
    for name, given in (("--load-dir", convert.load_dir), ("--lora-load", convert.lora_load)):
        if given and Path(given).resolve() == save:
            raise UserError(f"--save-dir {convert.save_dir} is also {name}: choose another folder for the result")
