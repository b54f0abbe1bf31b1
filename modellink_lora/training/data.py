"""The run's samples: which ones, in which order, and this replica's micro-batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from modellink_lora.config.adapter import LoraConfig
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.config.train import SftDataConfig, TrainConfig
from modellink_lora.data.batches import Batch, collate, micro_batches
from modellink_lora.data.check import check_corpus
from modellink_lora.data.corpus import InstructionCorpus
from modellink_lora.data.sft_dataset import SftDataset, sample_order, split_bounds
from modellink_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from modellink_lora.device.limits import host, of_all_ranks
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.training.agreement import Terms


class BatchStream:
    """Micro-batches of one replica, from one place in the order of samples to its end.

    Args:
        alike: pad all micro-batches of a `take` to one length. megatron-core's interleaved schedule needs that: it
            knows one length a step.
    """

    def __init__(
        self, samples: SftDataset, places: Iterator[list[tuple[int, int]]], *, alike: bool, **collate_settings: Any
    ) -> None:
        self._samples, self._places, self._alike, self._settings = samples, places, alike, collate_settings
        self.lengths: list[int] = []  # true lengths of the samples of the last `take`

    def take(self, count: int) -> list[Batch]:
        """The next `count` micro-batches."""
        taken = list(itertools.islice(self._places, count))
        assert len(taken) == count, "the order covers the run"
        read = [[self._samples[index] for _, index in places] for places in taken]
        self.lengths = [len(ids) for samples in read for ids, _ in samples]
        at_least = max(self.lengths) if self._alike else 0
        batches = []
        for places, samples in zip(taken, read, strict=True):
            batch = collate(samples, at_least=at_least, **self._settings)
            batches.append({**batch, "samples": torch.tensor([place for place, _ in places])})
        return batches


@dataclass(frozen=True)
class RunData:
    """Train, validation and test samples of a corpus, and how they become micro-batches."""

    corpus: InstructionCorpus
    splits: dict[str, range]
    config: SftDataConfig
    train: TrainConfig
    batch_size: int  # samples of one step
    context: ParallelContext
    notes: list[str]

    @property
    def interleaved(self) -> bool:
        """Whether stages hold several runs of layers."""
        return bool(self.context.config.num_layers_per_virtual_pipeline_stage)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step that each replica computes."""
        return self.batch_size // (self.train.micro_batch_size * self.context.dp_size)

    def samples_needed(self, iteration: int = 0, consumed_samples: int = 0) -> int:
        """Training samples of the whole run, where it goes on at `iteration`; the batch may have been another one."""
        return consumed_samples + max(0, self.train.train_iters - iteration) * self.batch_size

    @property
    def prompt_type(self) -> str | None:
        """Template that the data were made with, if anybody says."""
        return self.config.prompt_type or (self.corpus.sidecar or {}).get("prompt_type")

    def terms(self, lora: LoraConfig, iteration: int = 0, consumed_samples: int = 0) -> Terms:
        """What a resumed run must agree in, or tell."""
        train, span, held_out = self.train, self.splits["train"], self.splits["valid"]
        longest = int(self.corpus.lengths[span.start : span.stop].max())
        full = self.config.full_shuffle_instruction_dataset  # shuffles all epochs together, so their number matters
        data = {"data": self.corpus.fingerprint(), "samples": len(span), "seed": train.seed,
                "shuffle": self.config.shuffle, "longest_sample": min(longest, self.config.seq_length),
                "full_shuffle_of": self.samples_needed(iteration, consumed_samples) if full else None}  # fmt: skip
        if self.prompt_type:
            data["prompt_type"] = self.prompt_type
        sums = (self.corpus.sidecar or {}).get("crc32") or {}
        data |= {f"crc32_of_{key}": sums[f"{key}.bin"] for key in ("input_ids", "labels") if f"{key}.bin" in sums}
        validated = self.validation_batches("valid") * self.batch_size
        return Terms(data, {
            "loss_reduction": train.loss_reduction, "batch_size": self.batch_size,
            "micro_batch_size": train.micro_batch_size, "dtype": train.dtype, "lora_dtype": lora.dtype or train.dtype,
            "lora_dropout": lora.dropout, "adam_beta1": train.adam_beta1, "adam_beta2": train.adam_beta2,
            "adam_eps": train.adam_eps, "clip_grad": train.clip_grad, "lr_warmup_init": train.lr_warmup_init,
            "validation_samples": [held_out.start, held_out.start + validated],
        })  # fmt: skip

    @property
    def pad_multiple(self) -> int:
        """Padded lengths are multiples of this."""
        return self.config.pad_multiple(self._cut)

    @property
    def padded_length(self) -> int:
        """Length of fixed-length samples."""
        return self.config.padded_length(self._cut)

    @property
    def _cut(self) -> int:
        """Parts that sequence parallelism cuts a sequence into."""
        return self.context.tp_size if self.context.sequence_parallel else 1

    def stream(self, split: str, *, iteration: int = 0, consumed_samples: int = 0) -> BatchStream:
        """Micro-batches of this replica from `consumed_samples` on, where `iteration` begins.

        Training takes as many epochs as it needs.
        """
        span = self.splits[split]
        training = split == "train"
        needed = self.samples_needed(iteration, consumed_samples) if training else len(span)
        order = sample_order(
            len(span),
            needed,
            seed=self.train.seed,
            shuffle=self.config.shuffle and training,
            full_shuffle=self.config.full_shuffle_instruction_dataset and training,
        )
        places = micro_batches(
            order,
            consumed_samples=consumed_samples,
            micro_batch_size=self.train.micro_batch_size,
            data_parallel_rank=self.context.dp_rank,
            data_parallel_size=self.context.dp_size,
        )
        return BatchStream(
            SftDataset(self.corpus, span, seq_length=self.config.seq_length),
            places,
            alike=self.interleaved,
            pad_id=0,  # on the right of a causal model, and masked: no value there changes a result
            seq_length=self.padded_length,
            variable_seq_lengths=self.config.variable_seq_lengths,
            pad_to_multiple_of=self.pad_multiple,
        )

    def validation_batches(self, split: str) -> int:
        """Whole global batches of one validation, at most one pass over the split."""
        return min(self.train.eval_iters, len(self.splits[split]) // self.batch_size)

    def samples(self, split: str) -> SftDataset:
        """The samples of `split` that are read: by training all of them, by a validation the first ones."""
        span = self.splits[split]
        read = span if split == "train" else span[: self.validation_batches(split) * self.batch_size]
        return SftDataset(self.corpus, read, seq_length=self.config.seq_length)


def open_data(
    config: SftDataConfig, train: TrainConfig, model: ModelConfig, context: ParallelContext, *, tokenizer: str | None
) -> RunData:
    """Open the corpus and check it against the run.

    Args:
        tokenizer: folder to compare with the tokenizer the data were made with; None compares nothing.
    Raises:
        UserError: files missing or damaged, ids beyond the vocabulary, another template or tokenizer, no samples.
    """
    prefix = config.data_path[0]
    corpus = InstructionCorpus(prefix)
    if model.exact_length and config.seq_length > model.exact_length:
        raise UserError(
            f"--seq-length {config.seq_length} exceeds the {model.exact_length} tokens up to which the model attends "
            "to all of them in one way; windows and scaling with the length are not computed here: use at most that"
        )
    if config.seq_length > model.max_position_embeddings:
        raise UserError(
            f"--seq-length {config.seq_length} exceeds the model's {model.max_position_embeddings} positions; "
            "use a smaller one, or raise --max-position-embeddings if you mean it"
        )
    _check_origin(corpus, config, tokenizer)
    notes = [f"warning: {line}" for line in corpus.warnings()]
    if config.data_check:
        notes.append(f"data {_checked(corpus, model.vocab_size, context)}")
    else:
        notes.append("warning: --no-data-check: damaged data, and tokens that the model does not have, go unnoticed")
    batch_size = train.batch_size(context.dp_size)
    count, stages = batch_size // (train.micro_batch_size * context.dp_size), context.pp_size
    if context.config.num_layers_per_virtual_pipeline_stage and count % stages:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage needs a multiple of {stages} micro-batches a step and replica "
            f"(the pipeline's stages), --global-batch-size {batch_size} makes {count}: give a multiple of "
            f"{train.micro_batch_size * context.dp_size * stages}"
        )
    bounds = split_bounds(config.split, len(corpus))
    splits = dict(zip(("train", "valid", "test"), bounds, strict=True))
    if not len(splits["train"]):
        raise UserError(f"--split {config.split} leaves no training sample of {len(corpus)} in {prefix}")
    if not SftDataset(corpus, splits["train"], seq_length=config.seq_length).trains():
        raise UserError(
            f"--data-path {prefix}: no training sample has a trained token within --seq-length {config.seq_length}: "
            "the answers are missing or cut off. Look at the data with preprocess_data.py --preview, or raise "
            "--seq-length"
        )
    data = RunData(corpus, splits, config, train, batch_size, context, notes)
    notes += _lost_to_seq_length(data)
    if data.pad_multiple != config.pad_to_multiple_of and config.variable_seq_lengths:
        notes.append(
            f"--pad-to-multiple-of {config.pad_to_multiple_of} raised to {data.pad_multiple}: "
            f"sequence parallelism cuts every sequence into {context.tp_size}"
        )
    if data.padded_length != config.seq_length:
        notes.append(f"--seq-length {config.seq_length} padded to {data.padded_length} for sequence parallelism")
    if train.eval_iters and not data.validation_batches("valid"):
        found = f"--split {config.split} holds {len(splits['valid'])} validation samples of {len(corpus)}"
        if train.save_best:
            raise UserError(
                f"--save-best needs validations, but {found}, fewer than one batch of {batch_size}: raise the split's "
                "second number, lower --global-batch-size, or leave --save-best out"
            )
        notes.append(f"no validation: {found}, fewer than one batch of {batch_size}")
    return data


def _lost_to_seq_length(data: RunData) -> list[str]:
    """What the user should know of samples that are cut, and of held-out ones that are left without a trained token.

    Raises:
        UserError: no validation sample has a trained token.
    """
    told = []
    for split, name in (("train", "training"), ("valid", "validation"), ("test", "test")):
        samples = data.samples(split)
        cut = samples.cut()
        said = (
            f"{cut} of {len(samples)} {name} samples are longer than --seq-length {data.config.seq_length} and lose "
            "their end"
        )
        told += [f"warning: {said}"] if cut else []
        # of training samples the steps tell: a look at all of their labels is a pass over the data
        untrained = 0 if split == "train" else samples.untrained()
        if not untrained:
            continue
        if untrained < len(samples):
            told.append(
                f"warning: {untrained} of {len(samples)} {name} samples have no trained token; they add nothing to the "
                f"{name} loss"
            )
            continue
        nothing = f"no {name} sample has a trained token, so there is no {name} loss: " + (
            said if cut else "the answers are missing"
        )
        if split == "valid":
            raise UserError(
                f"{nothing}. Look at the data with preprocess_data.py --preview, raise --seq-length, change --split, "
                "or give --eval-iters 0 to train without validation"
            )
        told.append(f"warning: {nothing}")
    return told


def _checked(corpus: InstructionCorpus, vocab_size: int, context: ParallelContext) -> str:
    """Check the data by the first process of each host, while the others wait. What was done, for the summary."""
    assert dist.group.WORLD is not None
    hosts: list[str] = of_all_ranks(dist.group.WORLD, host)
    said: str | UserError | None = None
    if hosts.index(hosts[context.rank]) == context.rank:
        try:
            said = check_corpus(corpus, vocab_size)
        except UserError as error:
            said = error
    answers: list[str | UserError | None] = [None] * context.world_size
    dist.all_gather_object(answers, said)
    found = [answer for answer in answers if answer is not None]
    if failed := [answer for answer in found if isinstance(answer, UserError)]:
        raise failed[0]
    return str(found[0])


def _check_origin(corpus: InstructionCorpus, config: SftDataConfig, tokenizer: str | None) -> None:
    """Compare template and tokenizer of the data with the run's; data of other programs carry no record of them."""
    record = corpus.sidecar
    if record is None:
        return
    made_with = record.get("prompt_type")
    if config.prompt_type and made_with != config.prompt_type:
        raise UserError(
            f"--prompt-type {config.prompt_type} contradicts {config.data_path[0]}, which was made with {made_with}"
        )
    if tokenizer:
        loaded = load_tokenizer(
            tokenizer,
            prompt_type=made_with,
            use_fast=config.use_fast_tokenizer,
            trust_remote_code=config.trust_remote_code,
        )
        if tokenizer_fingerprint(loaded) != record.get("tokenizer_fingerprint"):
            raise UserError(
                f"{config.data_path[0]} was made with another tokenizer than {tokenizer}: "
                "preprocess again with this one"
            )
