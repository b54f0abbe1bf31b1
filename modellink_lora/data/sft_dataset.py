"""Which samples a run reads, in which order: the split into training, validation and test, and the shuffle of epochs.

Orders are worked out in memory, a few milliseconds for a million samples. Nothing is stored beside the data: a stored
order could outlive the data it was made for, and the folder of the data need not be writable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from modellink_lora.config.errors import UserError
from modellink_lora.data.corpus import InstructionCorpus
from modellink_lora.data.encode import IGNORED


def split_bounds(split: str, total: int) -> list[range]:
    """Samples of training, validation and test: consecutive ranges that cover `total`, in proportion to `split`.

    Args:
        split: up to three proportions with commas or slashes between, such as "949,50,1"; they need not sum to 1.
    """
    parts = split.replace("/", ",").split(",")
    try:
        weights = [float(part) for part in parts if part.strip()]
    except ValueError:
        raise UserError(f"--split {split!r}: give up to three numbers such as 949,50,1") from None
    if not 1 <= len(weights) <= 3 or not all(0 <= weight <= 1e38 for weight in weights) or not any(weights):
        raise UserError(f"--split {split!r}: give up to three numbers that are not negative, and one above 0")
    weights += [0.0] * (3 - len(weights))
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + round(weight / sum(weights) * total))
    # rounding may add or lose samples; every boundary moves by that much, so the ranges end at `total`
    surplus = ends[-1] - total
    bounds = [0] + [max(end - surplus, 0) for end in ends[1:]]
    return [range(bounds[i], bounds[i + 1]) for i in range(3)]


def sample_order(
    count: int, samples_needed: int, *, seed: int, shuffle: bool, full_shuffle: bool = False
) -> numpy.ndarray:
    """Indices below `count` in the order they are read, epoch after epoch, `samples_needed` of them.

    One RandomState(seed) draws the permutation of each epoch in turn: epochs differ, and asking for more samples only
    continues the order.

    Args:
        shuffle: False reads every epoch in the order of the file.
        full_shuffle: shuffle all epochs together; a sample can then come twice before another comes once, and the
            order depends on the number of epochs.
    """
    if samples_needed == 0:
        return numpy.zeros(0, dtype=numpy.int64)
    if count == 0:
        raise UserError(f"{samples_needed} samples are needed but this part of --split holds none; change --split")
    if full_shuffle and not shuffle:
        raise UserError("--no-shuffle and --full-shuffle-instruction-dataset exclude each other: choose one")
    epochs = -(-samples_needed // count)
    random = numpy.random.RandomState(seed)
    if full_shuffle:
        return random.permutation(numpy.tile(numpy.arange(count), epochs))[:samples_needed]
    order = [random.permutation(count) if shuffle else numpy.arange(count) for _ in range(epochs)]
    return numpy.concatenate(order)[:samples_needed]


class SftDataset:
    """Some samples of a corpus: `dataset[i]` is (input_ids, labels) of the i-th of `indices`, cut to `seq_length`."""

    def __init__(self, corpus: InstructionCorpus, indices: Sequence[int] | numpy.ndarray, *, seq_length: int) -> None:
        self._corpus = corpus
        self._indices = indices
        self._seq_length = seq_length

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        input_ids, labels = self._corpus[int(self._indices[index])]
        return input_ids[: self._seq_length], labels[: self._seq_length]

    def trains(self) -> bool:
        """Whether some sample holds a trained token within `seq_length`; looks as far as the first one."""
        return any((self[index][1][1:] != IGNORED).any() for index in range(len(self)))

    def cut(self) -> int:
        """How many of the samples are longer than `seq_length` and lose their end."""
        return int((self._corpus.lengths[numpy.asarray(self._indices, dtype=numpy.int64)] > self._seq_length).sum())

    def untrained(self) -> int:
        """How many of the samples hold no trained token within `seq_length`. Nothing predicts a first token."""
        return sum(not (self[index][1][1:] != IGNORED).any() for index in range(len(self)))
