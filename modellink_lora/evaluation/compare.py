"""Base, unmerged adapter and merged models on the same prompts: answers, logits, speed and memory, one after another.

Letters: n tokens of prompt and answer, v vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink_lora.checkpoint.adapter import Adapter
from modellink_lora.checkpoint.meta_reader import open_meta
from modellink_lora.config.compare import CompareConfig
from modellink_lora.config.engine import EngineConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.parallel import ParallelConfig
from modellink_lora.data.tokenizer import load_tokenizer
from modellink_lora.device import Device
from modellink_lora.evaluation.comparison import (
    ALLOWED_COARSE,
    ALLOWED_FINE,
    BASE,
    MERGED,
    MERGED_HF,
    MERGED_META,
    UNMERGED,
    Comparison,
    Gap,
    Reference,
    Variant,
    coarsest,
)
from modellink_lora.evaluation.disturbed import Disturbed
from modellink_lora.inference.engine import Engine
from modellink_lora.inference.executor import Batch, Executor
from modellink_lora.inference.logits import read_prompts
from modellink_lora.inference.model import SourceWeights, load_stage, open_adapters, open_any_base
from modellink_lora.inference.prompting import Prompter
from modellink_lora.inference.request import PLAIN, TUNED, Choice, NotFinite, Request, not_finite
from modellink_lora.models.build import DTYPES
from modellink_lora.parallel.context import ParallelContext, make_context
from modellink_lora.parallel.random import seed_everything
from modellink_lora.training.base import Base

_AT_ONCE = 256  # tokens whose logits are compared at once: bounds memory where prompts and vocabulary are large


@dataclass(frozen=True)
class Model:
    """Weights that are loaded once, and the ways they are run.

    Args:
        runs: name of a variant -> what runs beside the base.
        dtype: in which the weights are stored, where that matters.
    """

    base: Base
    adapters: Mapping[str, Adapter]
    runs: Mapping[str, Choice]
    where: str
    dtype: torch.dtype | None = None


def compare(
    config: CompareConfig,
    engine: EngineConfig,
    parallel: ParallelConfig,
    *,
    model_flags: Mapping[str, Any],
    lora_flags: Mapping[str, Any],
    device: Device,
    torch_device: torch.device,
    say: Callable[[str], None],
) -> Comparison | None:
    """Run every variant that is there; None on all processes but the first. The default process group exists.

    Raises:
        UserError: fewer than two variants, or something that does not fit together.
    """
    context = make_context(dataclasses.replace(parallel, sequence_parallel=False), torch_device)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        if context.is_main:
            say(line)

    models = _models(config, engine, model_flags, lora_flags, tp=context.tp_size, note=note)
    runs = [name for model in models for name in model.runs]
    reference = UNMERGED if UNMERGED in runs else next((name for name in MERGED if name in runs), runs[0])
    first = models[0]
    prompter = _prompter(engine, first, note)
    prompts = list(config.prompt) or read_prompts(Path(config.prompt_file or ""))
    ids = [prompter.text(prompt) for prompt in prompts]
    _check_lengths(ids, first.base.config, config.max_new_tokens)
    computed = DTYPES[engine.dtype]
    coarse = {coarsest((computed, model.dtype)) for model in models if model.dtype} if reference != BASE else set()
    models.sort(key=lambda model: reference not in model.runs)
    del first  # its weights would stay in memory
    variants: list[Variant] = []
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(config, engine, context, device, prompter, ids, reference, Reference(Path(folder)), note)
        while models:  # one at a time: each is let go, files and all, before the next is read
            variants += run(models.pop(0), coarse)
            coarse = set()
            gc.collect()
    if not context.is_main:
        return None
    by_name = {variant.name: variant for variant in variants}
    about = {
        "model": engine.load or str(config.merged_hf),
        "computed in": engine.dtype,
        "layout": f"TP {context.tp_size} x PP {context.pp_size}",
        "device": device.describe(),
    }
    order = [name for name in (BASE, UNMERGED, *MERGED) if name in by_name]
    return Comparison(prompts, [by_name[name] for name in order], reference, about, notes)


def _models(
    config: CompareConfig, engine: EngineConfig, model_flags: Mapping[str, Any], lora_flags: Mapping[str, Any],
    *, tp: int, note: Callable[[str], None],
) -> list[Model]:  # fmt: skip
    models: list[Model] = []
    if engine.lora_modules:
        raise UserError("--lora-modules: one adapter is compared with its merged forms; give it to --lora-load")
    if engine.load:
        base = open_any_base(engine, model_flags, tp=tp)
        adapters = open_adapters(engine, lora_flags, base)
        runs = {UNMERGED: Choice(TUNED), BASE: PLAIN} if adapters else {BASE: PLAIN}
        where = f"{engine.load} with {adapters[TUNED].folder}" if adapters else engine.load
        models.append(Model(base, adapters, runs, where))
        if not adapters:
            note("no --lora-load: the unmerged adapter is left out")
    elif engine.lora_load:
        raise UserError(f"--lora-load {engine.lora_load} needs the base it was trained on: give it to --load")
    else:
        note("no --load: base and unmerged adapter are left out")
    if config.merged_hf:
        if not (Path(config.merged_hf) / "config.json").is_file():
            raise UserError(f"--merged-hf {config.merged_hf}: holds no config.json; convert_ckpt.py --save-model-type "
                            "hf puts the merged model into SAVE_DIR/mg2hg")  # fmt: skip
        merged = open_any_base(dataclasses.replace(engine, load=config.merged_hf), {}, tp=tp)
        assert isinstance(merged.weights, SourceWeights)
        models.append(Model(merged, {}, {MERGED_HF: PLAIN}, config.merged_hf, merged.weights.source.dtype))
        _check_same(models[0].base.config, merged.config, f"--merged-hf {config.merged_hf}")
    else:
        note("no --merged-hf: left out")
    if config.merged_meta:
        if not models:
            raise UserError("--merged-meta alone: params.json tells neither positions nor tokens; give --load too")
        like = models[0].base
        weights = open_meta(Path(config.merged_meta), like.config, flag="--merged-meta")
        meta = Base(like.config, like.family, weights, Path(config.merged_meta))
        models.append(Model(meta, {}, {MERGED_META: PLAIN}, config.merged_meta, weights.layout.dtype))
    else:
        note("no --merged-meta: left out")
    if sum(len(model.runs) for model in models) < 2:
        raise UserError("nothing to compare: give at least two of --load, --lora-load (with --load), --merged-hf and "
                        "--merged-meta")  # fmt: skip
    return models


def _check_same(base: ModelConfig, merged: ModelConfig, flag: str) -> None:
    for name in ("num_layers", "hidden_size", "vocab_size"):
        if getattr(base, name) != getattr(merged, name):
            raise UserError(f"{flag}: has {name} {getattr(merged, name)}, the base {getattr(base, name)}: it is "
                            "another model")  # fmt: skip


def _prompter(engine: EngineConfig, first: Model, note: Callable[[str], None]) -> Prompter:
    """One encoding for all variants: that of the base, with the template that the adapter was trained with."""
    folder = engine.tokenizer_name_or_path or first.base.tokenizer_folder
    if folder is None:
        raise UserError(f"{first.where} keeps no tokenizer: give its folder to --tokenizer-name-or-path")
    kind = engine.prompt_type
    if kind is None and not engine.hf_chat_template and TUNED in first.adapters:
        kind = first.adapters[TUNED].meta.prompt_type
        if kind:
            note(f"prompts get the template that the adapter was trained with: --prompt-type {kind}")
    tokenizer = load_tokenizer(
        folder, prompt_type=kind, use_fast=engine.use_fast_tokenizer, trust_remote_code=engine.trust_remote_code
    )
    return Prompter(
        tokenizer, prompt_type=kind, hf_chat_template=engine.hf_chat_template, folder=Path(folder),
        stop_words=engine.add_eos_token, split_special_tokens=engine.split_special_tokens, say=note,
    )  # fmt: skip


def _longest(model: ModelConfig) -> int:
    return min(filter(None, (model.max_position_embeddings, model.exact_length)))


def _check_lengths(ids: Sequence[Sequence[int]], model: ModelConfig, new: int) -> None:
    for number, row in enumerate(ids, 1):
        if len(row) + new > _longest(model):
            raise UserError(f"prompt {number} has {len(row)} tokens and its answer may have {new}, the model has "
                            f"{_longest(model)} positions: shorten it, or lower --max-new-tokens")  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """Runs one model after another, that of the reference first."""

    config: CompareConfig
    settings: EngineConfig
    context: ParallelContext
    device: Device
    prompter: Prompter
    ids: Sequence[list[int]]  # of the prompts
    reference: str
    kept: Reference
    note: Callable[[str], None]
    sequences: list[list[int]] = field(default_factory=list)  # prompts with the reference's answers

    def __call__(self, model: Model, coarse: Collection[torch.dtype]) -> list[Variant]:
        """What the variants of `model` do, on the leader; nothing elsewhere.

        Args:
            coarse: dtypes whose rounding noise is to be measured, on the reference's model.
        """
        found: list[Variant] = []
        self.device.reset_peak_memory()
        with self._loaded(model.base, model.adapters, self.note) as executor:
            if executor is not None:
                found = self._answers(model, executor)
                for variant, choice in zip(found, model.runs.values(), strict=True):
                    self._compare(variant, executor, choice)
        for dtype in coarse:
            gc.collect()
            with self._loaded(Disturbed.of(model.base, dtype), model.adapters, lambda line: None) as executor:
                if executor is not None:
                    for key, logits in _logits(self.reference, executor, self.sequences, model.runs[self.reference]):
                        self.kept.keep_noise(key, dtype, logits)
        return found

    @contextlib.contextmanager
    def _loaded(
        self, base: Base, adapters: Mapping[str, Adapter], note: Callable[[str], None]
    ) -> Iterator[Executor | None]:
        """The model ready to run, on the leader; None on the others, after they have followed it."""
        seed_everything(self.settings.seed, self.context, self.device)  # megatron-core wants it; nothing is drawn
        stage, notes = load_stage(base, adapters, self.context, self.device, dtype=self.settings.dtype)
        for line in notes:
            note(line)
        executor = Executor(stage, self.context, say=lambda line: None)
        if not self.context.is_main:
            executor.follow()
            yield None
            return
        yield executor
        executor.dismiss()

    def _answers(self, model: Model, executor: Executor) -> list[Variant]:
        engine = Engine(
            executor, self.prompter.tokenizer, choices=tuple(model.adapters), max_batch=self.settings.max_batch_size,
            max_length=_longest(model.base.config), use_cache=self.settings.use_kv_cache,
        )  # fmt: skip
        found = []
        for name, choice in model.runs.items():
            asked = [
                Request(tuple(row), self.config.max_new_tokens, stop_ids=self.prompter.stop_ids, choice=choice)
                for row in self.ids
            ]
            try:
                # the first pass is slow: memory is allocated, kernels are chosen; of the prompts it sees one token
                engine.generate([dataclasses.replace(asked[0], ids=asked[0].ids[:1], max_new_tokens=2)])
                self.device.synchronize()
                begin = time.perf_counter()
                answers = engine.generate(asked)
            except NotFinite as error:
                raise NotFinite(error.what, prompt=f"{name}, prompt {error.index + 1}", index=error.index) from None
            seconds = time.perf_counter() - begin
            found.append(
                Variant(
                    name, str(self.settings.load) if name == BASE else model.where,
                    [one.text for one in answers], [one.ids for one in answers],
                    tokens_per_second=sum(len(one.tokens) for one in answers) / seconds,
                    weight_bytes=_weight_bytes(model, choice, self.settings.dtype), dtype=model.dtype,
                )
            )  # fmt: skip
        assert executor.cache is not None
        for variant in found:
            variant.cache_bytes, variant.peak_bytes = executor.cache.store.nbytes, self.device.memory()["max allocated"]
            if variant.name == self.reference:
                self.sequences.extend([*ids, *answer] for ids, answer in zip(self.ids, variant.ids, strict=True))
        return found

    def _compare(self, variant: Variant, executor: Executor, choice: Choice) -> None:
        """Keep the reference's logits, or measure those of another variant against them."""
        computed = DTYPES[self.settings.dtype]
        dtype = coarsest((computed, variant.dtype))
        allowed = None
        if variant.name in MERGED and self.reference != BASE:
            allowed = ALLOWED_FINE if dtype == computed else ALLOWED_COARSE
        gap = Gap(allowed, dtype) if variant.name != self.reference else None
        for key, logits in _logits(variant.name, executor, self.sequences, choice):
            if gap is None:
                self.kept.keep(key, logits)
            else:
                gap.add(logits, self.kept.read(key), self.kept.noise(key, dtype) if allowed else None)
        variant.gap = gap


def _logits(
    name: str, executor: Executor, sequences: Sequence[Sequence[int]], choice: Choice
) -> Iterator[tuple[str, Tensor]]:
    """(key, logits [n, v]) piece by piece, through row 0 of the cache. Raises NotFinite, with the variant's `name`."""
    executor.reserve(1, max(map(len, sequences)))
    for number, ids in enumerate(sequences):
        for start in range(0, len(ids), _AT_ONCE):
            piece = list(ids[start : start + _AT_ONCE])
            wanted = [(0, at) for at in range(len(piece))]
            logits = executor.forward(Batch(choice, [0], [start], [piece], wanted))
            if logits[:, 0].isnan().any():
                at = start + int(logits[:, 0].isnan().int().argmax()) + 1
                error = not_finite(f"after token {at} of prompt and answer", choice, executor.dtype)
                raise NotFinite(error.what, prompt=f"{name}, prompt {number + 1}", index=number)
            yield f"{number}.{start}", logits


def _weight_bytes(model: Model, choice: Choice, dtype: str) -> int:
    """Of the whole model on all processes, without what they hold twice."""
    total = model.base.config.parameter_count() * DTYPES[dtype].itemsize
    if adapter := model.adapters.get(choice.adapter):
        numbers = sum(math.prod(shape) for shape in adapter.shapes.values())
        total += numbers * DTYPES[adapter.meta.lora.dtype or dtype].itemsize
    return total


def agree(wrong: bool) -> bool:
    """The first process's verdict, on all of them."""
    word: list[Any] = [wrong]
    dist.broadcast_object_list(word, src=0)
    return bool(word[0])
