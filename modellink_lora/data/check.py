"""Whether token files are what was written and what the model can be trained on: one pass over all of them.

Nothing else would notice: a changed id is another word, a changed label another answer, and both train.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from modellink_lora.checkpoint.checksums import check_document, check_file, crc32
from modellink_lora.checkpoint.store import replacing_file
from modellink_lora.config.errors import UserError
from modellink_lora.data.corpus import KEYS, InstructionCorpus, data_file, sidecar_file
from modellink_lora.data.encode import IGNORED
from modellink_lora.device.limits import host

_BLOCK = 1 << 22  # tokens that are looked at together
_REMEMBERED = Path(".cache/modellink_lora/checked-data")  # below the home folder


def check_corpus(corpus: InstructionCorpus, vocab_size: int) -> str:
    """Compare the files with their recorded checksums, and ids and labels with each other and the vocabulary.

    What was found is remembered by host and the files' paths, sizes and times, so that the same files are read once.

    Returns:
        What was done, for the summary.
    Raises:
        UserError: a file is not what was written, an id is no token of the model, or a label is not its own token.
    """
    files = {f"{key}.{ending}": data_file(corpus.prefix, key, ending) for key in KEYS for ending in ("idx", "bin")}
    note = _note_of([*files.values(), sidecar_file(corpus.prefix)], vocab_size)
    if note is not None and note.is_file():
        return "checked before"
    record = corpus.sidecar or {}
    sums = check_document(record, where=sidecar_file(corpus.prefix))
    for name, file in files.items():
        if name not in ("input_ids.bin", "labels.bin"):  # which are read below
            check_file(file, sums, name=name)
    _check_tokens(corpus, vocab_size, sums, own=bool(record))
    _remember(note)
    return f"checked: ids, labels{' and checksums' if sums else ''} of {len(corpus.input_ids.tokens)} tokens"


def _check_tokens(corpus: InstructionCorpus, vocab_size: int, sums: Mapping[str, int], *, own: bool) -> None:
    """One pass over ids and labels, in blocks."""
    found = dict.fromkeys(("input_ids", "labels"), 0)
    ends: set[int] = set()  # ids of labels that are not their own token
    before = IGNORED  # the label of the place before the block
    for start in range(0, len(corpus.input_ids.tokens), _BLOCK):
        stored = {
            "input_ids": corpus.input_ids.tokens[start : start + _BLOCK],
            "labels": corpus.labels.tokens[start : start + _BLOCK],
        }
        for key, block in stored.items():
            found[key] = crc32(numpy.ascontiguousarray(block).view(numpy.uint8).data, found[key])
        ids, labels = (block.astype(numpy.int64) for block in stored.values())
        trained = labels != IGNORED
        _refuse(corpus, "input_ids", start, ids, (ids < 0) | (ids >= vocab_size), f"the model has {vocab_size} tokens")
        outside = trained & ((labels < 0) | (labels >= vocab_size))
        _refuse(corpus, "labels", start, labels, outside, f"a label is {IGNORED} or a token, of {vocab_size}")
        # ModelLink's templates of one end token a conversation put it into the label of the place after an answer
        foreign = trained & (labels != ids)
        after_answer = numpy.concatenate([[before != IGNORED], trained[:-1]])
        wrong = foreign if own else foreign & ~after_answer
        ends.update(int(label) for label in numpy.unique(labels[foreign])[:2])
        if len(ends) > 1:
            wrong = foreign
        _refuse(corpus, "labels", start, labels, wrong, f"a label is {IGNORED} or the token at its own place")
        before = labels[-1]
    for key, value in found.items():
        if sums.get(f"{key}.bin", value) != value:
            file = data_file(corpus.prefix, key, "bin")
            raise UserError(f"{file}: damaged (its CRC-32 differs from the one kept beside it): copy it again, or run "
                            "preprocess_data.py again")  # fmt: skip


def _refuse(corpus: InstructionCorpus, key: str, start: int, values: Any, wrong: Any, rule: str) -> None:
    if wrong.any():
        place = int(numpy.flatnonzero(wrong)[0])
        sample = int(numpy.searchsorted(numpy.cumsum(corpus.lengths, dtype=numpy.int64), start + place, side="right"))
        raise UserError(
            f"--data-path {corpus.prefix}: sample {sample} has {values[place]} among its {key}, but {rule}: preprocess "
            "with this model's own tokenizer, or copy the files again"
        )


def _note_of(files: list[Path], vocab_size: int) -> Path | None:
    """Where it is remembered that these files passed; None where there is no home folder."""
    seen = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files if file.is_file()
            for stat in (file.stat(),)]  # fmt: skip
    name = hashlib.sha256(json.dumps([host(), seen, vocab_size]).encode()).hexdigest()[:32]
    try:
        return Path.home() / _REMEMBERED / name
    except RuntimeError:
        return None


def _remember(note: Path | None) -> None:
    if note is None:
        return
    try:
        with replacing_file(note) as temporary:
            temporary.write_text("")
    except OSError:
        return  # a home folder that cannot be written: the files are read again the next time
