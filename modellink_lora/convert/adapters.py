"""An adapter alone from any format into any other: PEFT folder, this program's own, rank files of any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modellink_lora.checkpoint.adapter import Adapter, write_adapter
from modellink_lora.checkpoint.gguf_adapter import FILE, plan_gguf_adapter, write_gguf_adapter
from modellink_lora.checkpoint.hf import read_config_json
from modellink_lora.checkpoint.lora_rank_writer import common, write_lora_rank_files
from modellink_lora.checkpoint.peft import CONFIG, scalings, write_peft
from modellink_lora.checkpoint.peft_truncate import write_truncated
from modellink_lora.checkpoint.rank_tree import HF_FILES
from modellink_lora.checkpoint.store import TRACKER, iteration_folder, pointing_at
from modellink_lora.config.convert import ConvertConfig
from modellink_lora.config.errors import UserError
from modellink_lora.convert.endings import tell_stop
from modellink_lora.parallel.partition import Partition

Say = Callable[[str], None]


def export_adapter(convert: ConvertConfig, adapter: Adapter, say: Say) -> Path:
    """Write `adapter` as `convert` asks; the folder written."""
    folder = Path(convert.save_dir)
    if folder.resolve() == Path(str(convert.lora_load)).resolve():
        raise UserError(f"--save-dir {convert.save_dir} is also --lora-load: choose another folder for the result")
    there = folder / {"peft": CONFIG, "gguf-adapter": FILE}.get(convert.target, TRACKER)
    if there.exists() and not convert.overwrite:
        raise UserError(f"{there} exists: choose another --save-dir, or replace it by --overwrite")
    for note in adapter.notes:
        say(f"note: {note}")
    for warning in adapter.warnings:
        say(f"warning: {warning}")
    lora = adapter.meta.lora
    ranks = sorted({lora.rank_of(module) for module in adapter.modules})
    say(
        f"{convert.target}: {convert.lora_load} -> {folder}, {len(adapter.modules)} linears "
        f"({' '.join(lora.target_modules)}), rank {' and '.join(map(str, ranks))}"
    )
    write = {"peft": _peft, "gguf-adapter": _gguf, "adapter": _own, "adapter-ranks": _ranks}[convert.target]
    return write(convert, adapter, folder, say)


def _peft(convert: ConvertConfig, adapter: Adapter, folder: Path, say: Say) -> Path:
    base = _base_model(convert)
    own = adapter.meta.peft.settings.get("base_model_name_or_path") if adapter.meta.peft else None
    if base is None and (own is None or convert.svd_rank):
        say("note: base_model_name_or_path stays null, as neither the adapter nor --load-dir tells the base's name or "
            "folder: PEFT loads the adapter on a model that you load first; AutoPeftModel and vLLM's model listing "
            "need it: give --base-model-name-or-path")  # fmt: skip
    carry = _tokenizer(
        convert, adapter, say,
        how="set it as a stop token of the base (eos_token_id of generate, stop_token_ids of vLLM)",
    )  # fmt: skip
    if convert.svd_rank:
        if _stops(convert, say):
            return folder
        carry(folder)
        errors = write_truncated(folder, adapter, convert.svd_rank, base_model=base)
        worst = max(errors, key=lambda name: errors[name])
        say(f"relative error (Frobenius norm) of the updates: greatest {errors[worst]:.3g} ({worst}), "
            f"mean {sum(errors.values()) / len(errors):.3g}")  # fmt: skip
        kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in errors)
        greatest = (f"{k} {max(e for n, e in errors.items() if n.endswith('.' + k)):.3g}" for k in kinds)
        say(f"  greatest of each kind: {', '.join(greatest)}")
        say(f"wrote {folder}, every projection cut to rank {convert.svd_rank}")
        return folder
    if adapter.meta.peft is None and adapter.meta.lora.rank_pattern:
        say("note: projections that share a fused linear share its lora_A and rank; --svd-rank gives smaller ones")
    if len(scalings(adapter)) > 1:
        say("note: alpha / r differs among the modules; PEFT reads that from the patterns, vLLM reads no patterns and "
            "would scale some of them wrongly: merge the adapter for vLLM, or give --svd-rank")  # fmt: skip
    if _stops(convert, say):
        return folder
    carry(folder)
    names = write_peft(folder, adapter, base_model=base)
    say(f"wrote {folder}, {len(names)} tensors")
    return folder


def _tokenizer(convert: ConvertConfig, adapter: Adapter, say: Say, *, how: str) -> Callable[[Path], None]:
    """Name the token that ends answers; what writes the tokenizer that goes along, if any."""
    base = _base_files(convert)
    found = tell_stop(convert, adapter, base, say, how=how)
    if found is None or base is None:
        return lambda folder: None
    say("the base's tokenizer goes along, with the end token and the chat template of the training")
    return lambda folder: found.write_tokenizer(base, folder)


def _base_files(convert: ConvertConfig) -> Path | None:
    """Folder of the base's config.json and tokenizer, if --load-dir names one."""
    if not convert.load_dir:
        return None
    folder = Path(convert.load_dir) if convert.source == "hf" else Path(convert.load_dir) / HF_FILES
    return folder if (folder / "config.json").is_file() else None


def _base_model(convert: ConvertConfig) -> str | None:
    """Name or folder of the base: what the flag says, the Hugging Face folder, or what its config.json says."""
    if convert.base_model_name_or_path or not convert.load_dir:
        return convert.base_model_name_or_path
    if convert.source == "hf":
        return convert.load_dir
    kept = _base_files(convert)
    if kept is None:
        return None
    name = read_config_json(kept, flag="--load-dir").get("_name_or_path")
    return name if isinstance(name, str) and name else None


def _gguf(convert: ConvertConfig, adapter: Adapter, folder: Path, say: Say) -> Path:
    plan = plan_gguf_adapter(adapter)
    for note in plan.notes:
        say(f"note: {note}")
    carry = _tokenizer(
        convert, adapter, say,
        how="where the base's GGUF file has another, give llama.cpp --override-kv tokenizer.ggml.eos_token_id=int:ID, "
        "and --jinja with --chat-template-file",
    )  # fmt: skip
    if _stops(convert, say):
        return folder
    carry(folder)
    write_gguf_adapter(folder / FILE, adapter, plan)
    say(f"wrote {folder / FILE}, {2 * len(plan.names)} tensors, adapter.lora.alpha {plan.alpha:g}")
    return folder


def _own(convert: ConvertConfig, adapter: Adapter, folder: Path, say: Say) -> Path:
    written = iteration_folder(folder, adapter.meta.iteration)
    if _stops(convert, say):
        return folder
    tensors = {name: adapter.stored(name) for name in [*adapter.shapes, *adapter.replaced]}
    with pointing_at(folder, adapter.meta.iteration):
        write_adapter(written, tensors, adapter.meta)
    say(f"wrote {written}, {len(adapter.shapes)} tensors")
    return folder


def _ranks(convert: ConvertConfig, adapter: Adapter, folder: Path, say: Say) -> Path:
    tp = convert.target_tensor_parallel_size or 1
    layers, stages = adapter.meta.model.num_layers, convert.target_pipeline_parallel_size or 1
    partition = Partition.of(layers, stages, convert.layer_list, convert.num_layers_per_virtual_pipeline_stage)
    spelling = convert.spelling(None)
    r, alpha = common(adapter)
    say(f"TP {tp}, layers per stage {partition.describe()}, {spelling} names; ModelLink's flags for it: "
        f"--lora-r {r} --lora-alpha {alpha:g}")  # fmt: skip
    tell_stop(convert, adapter, _base_files(convert), say, how="rank files do not keep it")
    if any(adapter.meta.lora.rank_of(module) != r for module in adapter.modules):
        say(f"note: rank files have one rank: smaller ones are filled up to {r} with zeros")
    if _stops(convert, say):
        return folder
    written = write_lora_rank_files(folder, adapter, tp=tp, partition=partition, spelling=spelling)
    say(f"wrote {written}")
    return folder


def _stops(convert: ConvertConfig, say: Say) -> bool:
    if convert.dry_run:
        say("dry run: nothing was written")
    return convert.dry_run
