"""The preprocessing job: rows of a data set in, token files out, and a table of what was kept and what was dropped."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from modellink_lora import __version__
from modellink_lora.config.errors import UserError, printable
from modellink_lora.config.preprocess import PreprocessConfig
from modellink_lora.data.corpus import KEYS, CorpusWriter, data_file, sidecar_file, writing_corpus
from modellink_lora.data.encode import Sample, drop_reason, encode, too_long
from modellink_lora.data.handlers import EMPTY_ANSWER, RecordReader, reader_for
from modellink_lora.data.preview import marked_text
from modellink_lora.data.prompt import turns, without_end
from modellink_lora.data.records import Record, Records, open_records
from modellink_lora.data.templates import EOS, Template, get_template
from modellink_lora.data.text_encoder import NotText, TextEncoder
from modellink_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint

Say = Callable[[str], None]

_REASONS_SHOWN = 20
_ROWS_PER_TASK = 64  # records a worker takes at once
_TASKS_PER_WAVE = 8  # tasks per worker between two waits; bounds the rows held in memory


@dataclass
class Summary:
    """What became of the records: how many were kept, and per reason how many were dropped and which was the first."""

    records: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, tuple[int, int]] = field(default_factory=dict)  # reason -> (count, first record)
    places: dict[str, str] = field(default_factory=dict)  # reason -> file and line of the first record
    unused_keys: set[str] = field(default_factory=set)  # of messages
    special_text: int = 0  # samples with text that spells special tokens
    spelled: set[str] = field(default_factory=set)  # those tokens

    def drop(self, reason: str, where: str) -> None:
        """Count the record that comes next, which stands at `where`, as dropped."""
        count, first = self.dropped.get(reason, (0, self.records))
        self.dropped[reason] = (count + 1, first)
        self.places.setdefault(reason, where)

    def table(self) -> str:
        """A line for the samples kept and one for each reason, the most frequent first."""
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        mean = self.tokens / self.samples if self.samples else 0.0
        lines = [
            f"kept    {self.samples:>9} of {self.records} records, {self.tokens} tokens, {mean:.0f} a sample, "
            f"{share:.0%} of them trained"
        ]
        reasons = sorted(self.dropped.items(), key=lambda item: (-item[1][0], item[1][1]))
        for reason, (count, first) in reasons[:_REASONS_SHOWN]:
            lines.append(
                f"dropped {count:>9} {reason}; the first is record {first} (counted from 0), {self.places[reason]}"
            )
        if further := reasons[_REASONS_SHOWN:]:
            total = sum(count for _, (count, _) in further)
            lines.append(f"dropped {total:>9} for {len(further)} further reasons")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Encoder:
    """All that turns one record into a sample; goes to the workers once."""

    reader: RecordReader
    template: Template
    text: TextEncoder
    append_eod: bool
    seq_length: int | None

    def __call__(self, record: Record) -> Sample | str:
        """The sample, or the reason why the record is dropped."""
        conversation = record.fault or self.reader.read(record.row)
        if isinstance(conversation, str):
            return conversation
        end = self.text.eos_token_id
        if not all(without_end(answer.content, self.text.eos_token).strip() for answer in conversation.messages[1::2]):
            return EMPTY_ANSWER
        self.text.met.clear()
        try:
            pairs = turns(conversation, self.template, self.text)
        except NotText as error:
            return str(error)
        # a template that writes no end token keeps the one that an answer spells
        ended = EOS not in self.template.assistant and [*pairs[-1][0], *pairs[-1][1]][-1:] == [end]
        sample = encode(pairs, eos_id=end, append_eod=self.append_eod and not ended)
        return drop_reason(sample, seq_length=self.seq_length) or replace(sample, special_text=frozenset(self.text.met))


def run(config: PreprocessConfig, *, say: Say = print) -> Summary:
    """Do the job and return what it did. Raises UserError, leaving earlier output as it was, when it cannot be done."""
    started = time.monotonic()
    say(f"building dataset: {config.input}")
    template = get_template(config.prompt_type)
    records = open_records(config.input)
    columns = records.columns()
    reader = reader_for(config.handler_name, config.map_keys, columns)
    _say_source(records, reader, columns, config, say)
    tokenizer = load_tokenizer(
        config.tokenizer_name_or_path,
        prompt_type=template.name,
        use_fast=config.use_fast_tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    if not config.use_fast_tokenizer and tokenizer.is_fast:
        say("--tokenizer-not-use-fast: this tokenizer has only its fast form, which is used")
    say(f"Vocab size: {len(tokenizer)}")
    say(f"Output prefix: {config.output_prefix}")
    say(f"Time to startup:{time.monotonic() - started:.1f}")

    text = TextEncoder(tokenizer, split_special_tokens=config.split_special_tokens, template_text=template.text)
    encoder = _Encoder(reader, template, text, config.append_eod, config.seq_length)
    _preview(config.preview, records, encoder, say)
    sidecar = _sidecar(config, tokenizer)
    with writing_corpus(config.output_prefix, sidecar) as writer:
        summary = _write(encoder, records, writer, config, say)
        sidecar["records"] = summary.records
        sidecar["special_text_samples"] = summary.special_text
        sidecar["dropped"] = {reason: count for reason, (count, _) in summary.dropped.items()}
        if not summary.samples:
            raise UserError(f"--input {config.input}: no sample is left of {summary.records} records: {_why(summary)}")
    if config.seq_length is not None:
        skipped = summary.dropped.get(too_long(config.seq_length), (0, 0))[0]
        say(f"Skip {skipped} sample exceeded seq-length({config.seq_length})")
    say(summary.table())
    if summary.unused_keys:
        say(f"keys of messages not used: {_listed(summary.unused_keys)}")
    if summary.special_text:
        say(f"text of {summary.special_text} samples spells special tokens ({_listed(summary.spelled)}): "
            + ("it stays text; --no-split-special-tokens makes it those tokens" if config.split_special_tokens
               else "it became those tokens (--no-split-special-tokens)"))  # fmt: skip
    say(f"wrote {data_file(config.output_prefix, '{' + ','.join(KEYS) + '}', '{bin,idx}')}")
    say(f"wrote {sidecar_file(config.output_prefix)}")
    return summary


def _say_source(records: Records, reader: RecordReader, columns: list[str], config: PreprocessConfig, say: Say) -> None:
    say(f"loading data from local file, format: {records.format}, file num: {len(records.files)}")
    for note in records.notes:
        say(note)
    if records.skipped:
        say(f"not read: {printable(', '.join(file.name for file in records.skipped))}")
    say(f"dataset will use {config.handler_name} to handle dataset")
    if unused := reader.unused(columns):
        say(f"columns not used: {printable(', '.join(unused))} (--map-keys gives a column a meaning)")


def _preview(count: int, records: Records, encoder: _Encoder, say: Say) -> None:
    if not count:
        return
    kept = (sample for sample in map(encoder, records.rows(encoder.reader.columns)) if isinstance(sample, Sample))
    for number, sample in enumerate(itertools.islice(kept, count)):
        trained = sum(label >= 0 for label in sample.labels)
        say(f"--- sample {number}: {len(sample.input_ids)} tokens, {trained} trained (marked) ---")
        say(marked_text(sample, encoder.text.tokenizer, colour=sys.stdout.isatty()))
    say("---")


def _write(encoder: _Encoder, records: Records, writer: CorpusWriter, config: PreprocessConfig, say: Say) -> Summary:
    """Encode every row, in order, and add the samples to `writer`."""
    summary = Summary()
    started = time.monotonic()
    with tqdm(desc="tokenising", unit="doc", disable=not sys.stderr.isatty()) as bar:
        rows = _noted(records.rows(encoder.reader.columns), encoder.reader, summary)
        for where, result in _results(encoder, rows, config.workers):
            if isinstance(result, str):
                summary.drop(result, where)
            else:
                writer.add(result.input_ids, result.attention_mask, result.labels)
                summary.special_text += bool(result.special_text)
                summary.spelled |= result.special_text
            summary.records += 1
            bar.update()
            if bar.disable and summary.records % config.log_interval == 0:
                seconds = max(time.monotonic() - started, 1e-6)
                megabytes = 4 * len(KEYS) * writer.tokens / 2**20
                say(
                    f"Processed {summary.records} documents "
                    f"({summary.records / seconds:.1f} docs/s, {megabytes / seconds:.1f} MB/s)."
                )
    summary.samples, summary.tokens = len(writer.lengths), writer.tokens
    summary.trained_tokens = writer.trained_tokens
    return summary


def _noted(records: Iterator[Record], reader: RecordReader, summary: Summary) -> Iterator[Record]:
    """The records, while the keys of their messages that are not read are noted."""
    for record in records:
        summary.unused_keys |= reader.unused_keys(record.row)
        yield record


def _results(encoder: _Encoder, records: Iterator[Record], workers: int) -> Iterator[tuple[str, Sample | str]]:
    """Place and result of every record, in the order of the records whatever the number of workers."""
    if workers == 1:
        yield from ((record.where, encoder(record)) for record in records)
        return
    wave = workers * _TASKS_PER_WAVE * _ROWS_PER_TASK
    # not multiprocessing.Pool: it waits for ever when a worker is killed
    with ProcessPoolExecutor(workers, initializer=_keep, initargs=(encoder,)) as pool:
        while block := list(itertools.islice(records, wave)):
            try:
                results = pool.map(_encode, block, chunksize=_ROWS_PER_TASK)
                yield from zip((record.where for record in block), results, strict=True)
            except BrokenProcessPool:
                raise UserError(
                    f"a worker process was stopped from outside, perhaps for lack of memory: lower --workers {workers}"
                ) from None


_kept: _Encoder | None = None  # in a worker process: what it was started for


def _keep(encoder: _Encoder) -> None:
    global _kept
    _kept = encoder


def _encode(record: Record) -> Sample | str:
    assert _kept is not None
    return _kept(record)


def _sidecar(config: PreprocessConfig, tokenizer: Any) -> dict[str, Any]:
    """What is recorded about the data besides the counts."""
    return {
        "format": 1,
        "made_by": f"modellink_lora {__version__}",
        "input": config.input,
        "handler_name": config.handler_name,
        "map_keys": config.map_keys,
        "prompt_type": config.prompt_type,
        "tokenizer_name_or_path": config.tokenizer_name_or_path,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "append_eod": config.append_eod,
        "split_special_tokens": config.split_special_tokens,
        "seq_length": config.seq_length,
    }


def _listed(names: set[str]) -> str:
    """Some of the names; a data set can spell hundreds."""
    return printable(", ".join(sorted(names)[:_REASONS_SHOWN])) + (", ..." if len(names) > _REASONS_SHOWN else "")


def _why(summary: Summary) -> str:
    reasons = [
        f"{count} x {reason} (the first: {summary.places[reason]})" for reason, (count, _) in summary.dropped.items()
    ]
    return "; ".join(reasons[:_REASONS_SHOWN]) or "the data set is empty"
