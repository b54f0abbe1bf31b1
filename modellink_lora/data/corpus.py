"""The token files of a data set, `PREFIX_packed_KEY_document.{bin,idx}`, and the record of how they were made.

The keys are input_ids, attention_mask and labels. The two files of a key are laid out like Megatron's indexed
dataset, all little endian:

    .bin   int32 tokens of all sequences, one after the other
    .idx   magic "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype code | u64 sequences S | u64 document boundaries D
           | int32 x S lengths | int64 x S byte offsets into .bin | int64 x D boundaries, the first 0, the last S

`PREFIX_packed.json` beside them says what they were made with; files that other programs wrote have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from modellink_lora.checkpoint.checksums import check_document, with_checksums
from modellink_lora.checkpoint.fileset import finish_replacing, replacing_files
from modellink_lora.config.document import read_document, to_json
from modellink_lora.config.errors import UserError

KEYS = ("input_ids", "attention_mask", "labels")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which are no tokens
_INT32 = 4


def data_file(prefix: str, key: str, ending: str) -> Path:
    """`PREFIX_packed_KEY_document.ENDING`."""
    return Path(f"{prefix}_packed_{key}_document.{ending}")


def sidecar_file(prefix: str) -> Path:
    """`PREFIX_packed.json`."""
    return Path(f"{prefix}_packed.json")


class CorpusWriter:
    """Collects samples under temporary names. Made by `writing_corpus`."""

    def __init__(self, streams: Mapping[str, BinaryIO]) -> None:
        self._streams = streams
        self.lengths: list[int] = []
        self.tokens = 0
        self.trained_tokens = 0
        self.max_token_id = -1

    def add(self, input_ids: Sequence[int], attention_mask: Sequence[int], labels: Sequence[int]) -> None:
        """Append one sample. Raises UserError for an id that the files cannot hold."""
        assert len(input_ids) == len(attention_mask) == len(labels) > 0
        self.max_token_id = max(self.max_token_id, *input_ids)
        if self.max_token_id >= 2**31:
            raise UserError(f"the tokenizer gives the token id {self.max_token_id}, which is no int32: mend its files")
        for key, values in zip(KEYS, (input_ids, attention_mask, labels)):
            self._streams[key].write(numpy.asarray(values, dtype="<i4").tobytes())
        self.lengths.append(len(input_ids))
        self.tokens += len(input_ids)
        self.trained_tokens += sum(label >= 0 for label in labels)


@contextlib.contextmanager
def writing_corpus(prefix: str, sidecar: dict[str, Any]) -> Iterator[CorpusWriter]:
    """A writer whose files take their names when the block succeeds; when it fails, what was there before stays.

    Args:
        sidecar: what to record about the data; read when the block ends, the counts are added here.
    """
    names = {(key, ending): data_file(prefix, key, ending) for ending in ("idx", "bin") for key in KEYS}
    record = sidecar_file(prefix)
    with replacing_files(_commit_file(prefix), [*names.values(), record]) as temporary:
        with contextlib.ExitStack() as streams:
            opened = {key: streams.enter_context(open(temporary[names[key, "bin"]], "wb")) for key in KEYS}
            writer = CorpusWriter(opened)
            yield writer
        for key in KEYS:
            temporary[names[key, "idx"]].write_bytes(_index(writer.lengths))
        counts = {
            "samples": len(writer.lengths),
            "tokens": writer.tokens,
            "trained_tokens": writer.trained_tokens,
            "max_token_id": writer.max_token_id,
        }
        places = {f"{key}.{ending}": temporary[name] for (key, ending), name in names.items()}  # sets may be renamed
        # names of files need not be Unicode; what is not becomes a question mark
        text = to_json({**sidecar, **counts}).encode("utf-8", "replace")
        document = with_checksums(json.loads(text), places)
        temporary[record].write_text(to_json(document, indent=2) + "\n", encoding="utf-8")


def _commit_file(prefix: str) -> Path:
    """The renames of a set of files that are left to do; there only while they are done, or after a kill then."""
    record = sidecar_file(prefix)
    return record.with_name(f".{record.stem}.commit")


def _index(lengths: Sequence[int]) -> bytes:
    """Content of an .idx file; every sequence is a document of its own."""
    count = len(lengths)
    sizes = numpy.asarray(lengths, dtype="<i4")
    ends = numpy.cumsum(sizes, dtype="<i8") * 4
    offsets = numpy.concatenate([numpy.zeros(min(count, 1), dtype="<i8"), ends[:-1]])
    boundaries = numpy.arange(count + 1, dtype="<i8")
    header = _HEADER.pack(_MAGIC, 1, _INT32, count, count + 1)
    return header + sizes.tobytes() + offsets.astype("<i8").tobytes() + boundaries.tobytes()


class _Sequences:
    """One key: the sequences of a .bin file, mapped into memory."""

    def __init__(self, prefix: str, key: str) -> None:
        index, tokens = data_file(prefix, key, "idx"), data_file(prefix, key, "bin")
        content = index.read_bytes()
        if len(content) < _HEADER.size or not content.startswith(_MAGIC):
            raise UserError(f"{index}: is not an index of token data; run preprocess_data.py again")
        _, version, code, count, boundaries = _HEADER.unpack_from(content)
        if version != 1 or code not in _DTYPES:
            raise UserError(
                f"{index}: version {version}, dtype code {code} are not known; run preprocess_data.py again"
            )
        expected = _HEADER.size + 12 * count + 8 * boundaries
        if len(content) != expected:
            raise UserError(
                f"{index}: is damaged: {len(content)} bytes, {expected} expected for {count} sequences; "
                "copy it again or run preprocess_data.py again"
            )
        self.lengths = numpy.frombuffer(content, "<i4", count, _HEADER.size)
        self._offsets = numpy.frombuffer(content, "<i8", count, _HEADER.size + 4 * count)
        self._dtype = numpy.dtype(_DTYPES[code])
        ends = numpy.cumsum(self.lengths, dtype="<i8") * self._dtype.itemsize
        if count and (
            self.lengths.min() < 1 or not numpy.array_equal(self._offsets[1:], ends[:-1]) or self._offsets[0]
        ):
            raise UserError(f"{index}: is damaged: its sequences are empty or do not lie one after another; copy it "
                            "again or run preprocess_data.py again")  # fmt: skip
        needed = int((self._offsets + self.lengths * self._dtype.itemsize).max()) if count else 0
        found = tokens.stat().st_size
        if found < needed:
            raise UserError(
                f"{tokens}: is truncated: {found} bytes found, {needed} expected from {index.name}; "
                "copy it again or run preprocess_data.py again"
            )
        if found > needed:
            raise UserError(
                f"{tokens}: {found} bytes found, {needed} expected from {index.name}: the two files are not of one "
                "run; run preprocess_data.py again"
            )
        self.tokens = numpy.memmap(tokens, dtype=self._dtype, mode="r") if needed else numpy.zeros(0, self._dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> numpy.ndarray:
        start = int(self._offsets[index]) // self._dtype.itemsize
        return numpy.asarray(self.tokens[start : start + int(self.lengths[index])])


class InstructionCorpus:
    """An instruction data set on disk: `corpus[i]` is (input_ids, labels), int64, labels not yet shifted."""

    def __init__(self, prefix: str) -> None:
        """Open the files at `prefix`. Raises UserError naming a file that is missing, cut off or does not fit."""
        finish_replacing(_commit_file(prefix))
        wanted = [data_file(prefix, key, ending) for key in KEYS for ending in ("bin", "idx")]
        missing = [file for file in wanted if not file.is_file()]
        if missing:
            names = ", ".join(file.name for file in missing)
            raise UserError(
                f"--data-path {prefix}: {names} missing in {wanted[0].parent}; "
                "give the prefix that preprocess_data.py was given as --output-prefix"
            )
        self.prefix = prefix
        # the mask is all ones and never read, but a set whose mask does not fit was not written in one go
        parts = {key: _Sequences(prefix, key) for key in KEYS}
        for key in KEYS[1:]:
            _require_same_lengths(prefix, key, parts["input_ids"].lengths, parts[key].lengths)
        self.input_ids, self.labels = parts["input_ids"], parts["labels"]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        return self.input_ids[index].astype(numpy.int64), self.labels[index].astype(numpy.int64)

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each sample."""
        return self.input_ids.lengths

    def fingerprint(self) -> str:
        """Identity of the data: a hash of every length, and of ids and labels at 256 places spread over them."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for part in (self.input_ids, self.labels):
            places = numpy.linspace(0, max(0, len(part.tokens) - 64), 256).astype(numpy.int64)
            for place in places:
                digest.update(part.tokens[place : place + 64].astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def sidecar(self) -> dict[str, Any] | None:
        """What `PREFIX_packed.json` says about the data; None when there is none, or it belongs to other files."""
        file = sidecar_file(self.prefix)
        if not file.is_file():
            return None
        record = read_document(file, dict[str, Any])
        check_document(record, where=file)
        here = (len(self), int(self.lengths.sum(dtype=numpy.int64)))
        if (record.get("samples"), record.get("tokens")) != here:
            return None
        return record

    def warnings(self) -> list[str]:
        """What a user should know before training on these files; the caller prints it once."""
        found = []
        if self.sidecar is None and sidecar_file(self.prefix).is_file():
            found.append(f"{sidecar_file(self.prefix)} describes other data and is ignored")
        if len(self) and self._labels_repeat_the_ids():
            found.append(
                f"{self.prefix}: every label equals its token, so questions are trained like answers (packed sets of "
                "older versions are like that); preprocess the data again to train the answers only"
            )
        return found

    def _labels_repeat_the_ids(self) -> bool:
        # ends at the first sample that has an ignored label, as a rule the very first
        return all(numpy.array_equal(self.labels[i], self.input_ids[i]) for i in range(len(self)))


def _require_same_lengths(prefix: str, key: str, expected: numpy.ndarray, found: numpy.ndarray) -> None:
    if len(expected) != len(found):
        raise UserError(
            f"--data-path {prefix}: {len(expected)} sequences of input_ids but {len(found)} of {key}; "
            "the files are not of one run, run preprocess_data.py again"
        )
    different = numpy.flatnonzero(expected != found)
    if len(different):
        i = int(different[0])
        raise UserError(
            f"--data-path {prefix}: sequence {i} has {expected[i]} input_ids but {found[i]} {key}; "
            "the files are not of one run, run preprocess_data.py again"
        )
