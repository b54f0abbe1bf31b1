"""A conversion's result as a folder in Meta's format: what is said, where it goes, and the blocks of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from modellink_lora.checkpoint.meta import PARAMS, TOKENIZER, WEIGHTS, MetaLayout, MetaTensor, write_meta
from modellink_lora.convert.plan import Plan, job_memory
from modellink_lora.convert.transfer import Transfer


def meta_layout(plan: Plan) -> MetaLayout:
    return MetaLayout(plan.config, plan.tp, plan.dtype, plan.dtypes)


def meta_blocks(transfer: Transfer, plan: Plan, tensor: MetaTensor, rank: int) -> Iterator[Tensor]:
    """Consecutive blocks of `tensor` as the file of `rank` holds it."""
    rows = transfer.blocks(plan.move(tensor.source), lambda full: tensor.pick(full, rank))
    return tensor.blocks(rows, rank)


def meta_notes(plan: Plan, tokenizer: Path | None) -> Iterator[str]:
    """What the user should know about a folder in Meta's format."""
    layout = meta_layout(plan)
    code, cut = ("Llama 3", "rows") if layout.is_llama_3 else ("Llama 1 and 2", "columns")
    yield f"for the code of {code}" + (f", which cuts the embedding by {cut}" if plan.tp > 1 else "")
    if not plan.config.untie_embeddings_and_output_weights:
        yield "the output layer is tied to the embedding: output.weight is written as a copy of it"
    if tokenizer is None:
        yield f"no {TOKENIZER} came with the model, and Meta's code asks for one: put it beside {PARAMS}"


def meta_tokenizer(companions: Path | None) -> Path | None:
    """The tokenizer.model that belongs to the model; Llama 3's folders have it below `original`."""
    if companions is None:
        return None
    places = (companions / TOKENIZER, companions / "original" / TOKENIZER)
    return next((path for path in places if path.is_file()), None)


def meta_taken(save: Path) -> Path | None:
    """A file of `save` that belongs to another result."""
    return next((path for path in (save / PARAMS, *save.glob(WEIGHTS)) if path.exists()), None)


def write_meta_folder(
    save: Path, plan: Plan, transfer: Transfer, *, tokenizer: Path | None, workers: int, check: Callable[[Path], None]
) -> Path:
    write_meta(
        save, meta_layout(plan), lambda tensor, rank: meta_blocks(transfer, plan, tensor, rank), tokenizer=tokenizer,
        workers=workers, memory=workers * max(map(job_memory, plan.moves)),
        memory_of=lambda name: job_memory(plan.move(name)), check=check,
    )  # fmt: skip
    return save
