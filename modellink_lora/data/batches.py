"""From samples to the tensors of a micro-batch, and which samples a data-parallel rank reads.

b samples of the micro-batch, s padded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch
from torch import Tensor

from modellink_lora.data.encode import IGNORED

Sample = tuple[numpy.ndarray, numpy.ndarray]
Batch = dict[str, Tensor]  # tokens, labels, loss_mask, position_ids: [b, s]; samples: [b]


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    seq_length: int,
    variable_seq_lengths: bool,
    pad_to_multiple_of: int,
    at_least: int = 0,
) -> Batch:
    """Pad (input_ids, labels) pairs on the right and shift the labels to the position that predicts them.

    `labels[:, i]` is the token after position i, 0 where `loss_mask[:, i]` is 0; the last position predicts nothing.

    Args:
        variable_seq_lengths: pad to the longest sample, rounded up to `pad_to_multiple_of`, not to `seq_length`.
        at_least: a length that counts as one of the samples'.
    """
    longest = max(at_least, *(len(input_ids) for input_ids, _ in samples))
    assert longest <= seq_length, "the data set cuts samples"
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of if variable_seq_lengths else seq_length
    tokens = torch.full((len(samples), width), pad_id, dtype=torch.int64)  # [b, s]
    labels = torch.full((len(samples), width), IGNORED, dtype=torch.int64)  # [b, s]
    for row, (input_ids, targets) in enumerate(samples):
        tokens[row, : len(input_ids)] = torch.from_numpy(input_ids)
        labels[row, : len(targets) - 1] = torch.from_numpy(targets[1:])
    loss_mask = (labels != IGNORED).to(torch.float32)
    return {
        "tokens": tokens,
        "labels": labels.masked_fill(labels == IGNORED, 0),
        "loss_mask": loss_mask,
        "position_ids": torch.arange(width).expand(len(samples), width).contiguous(),
    }


def micro_batches(
    order: Sequence[int] | numpy.ndarray,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[list[tuple[int, int]]]:
    """(place in `order`, sample number) of each micro-batch of one rank, from `consumed_samples` on.

    order:  | rank 0 | rank 1 | rank 0 | rank 1 | rest, not read
            |<- one micro-batch ->|
                   each rank
    """
    block = micro_batch_size * data_parallel_size
    first = data_parallel_rank * micro_batch_size
    for start in range(consumed_samples, len(order) - block + 1, block):
        yield [(place, int(order[place])) for place in range(start + first, start + first + micro_batch_size)]
