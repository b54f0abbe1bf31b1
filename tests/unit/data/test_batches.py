"""Batches: labels stand where they are predicted, padding trains nothing, and ranks share the samples out."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from modellink_lora.data.batches import collate, micro_batches

SHORT = (numpy.array([5, 6, 7]), numpy.array([-100, 6, 7]))
LONG = (numpy.array([1, 2, 3, 4, 9]), numpy.array([-100, -100, 3, -100, 9]))


def collated(*samples: Any, variable: bool = True, multiple: int = 4, seq_length: int = 8) -> dict[str, Any]:
    return collate(
        samples, pad_id=99, seq_length=seq_length, variable_seq_lengths=variable, pad_to_multiple_of=multiple
    )


def test_labels_are_the_next_tokens_and_the_mask_is_one_where_they_are_trained() -> None:
    batch = collated(SHORT, LONG)
    assert batch["tokens"].tolist() == [[5, 6, 7, 99, 99, 99, 99, 99], [1, 2, 3, 4, 9, 99, 99, 99]]
    assert batch["labels"].tolist() == [[6, 7, 0, 0, 0, 0, 0, 0], [0, 3, 0, 9, 0, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64,
    }  # fmt: skip


def test_a_trained_end_of_sequence_keeps_its_mask_where_it_is_also_the_pad_token() -> None:
    sample = (numpy.array([5, 99]), numpy.array([-100, 99]))
    batch = collated(sample)
    assert batch["loss_mask"].tolist() == [[1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[99, 0, 0, 0]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (6, 6), (5, 5)])
def test_variable_lengths_are_the_longest_sample_rounded_up(multiple: int, width: int) -> None:
    assert collated(SHORT, LONG, multiple=multiple)["tokens"].shape == (2, width)


def test_fixed_lengths_are_always_the_sequence_length() -> None:
    assert collated(SHORT, variable=False, seq_length=7)["tokens"].shape == (1, 7)


def test_a_sample_alone_has_the_same_targets_as_in_a_batch() -> None:
    both, alone = collated(SHORT, LONG), collated(SHORT)
    for key in ("tokens", "labels", "loss_mask"):
        assert torch.equal(both[key][0, :4], alone[key][0])


def batches_of(ranks: int, *, consumed: int = 0, size: int = 2, count: int = 19) -> list[list[list[tuple[int, int]]]]:
    order = numpy.arange(count) + 100
    return [
        list(
            micro_batches(
                order,
                consumed_samples=consumed,
                micro_batch_size=size,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
        )
        for rank in range(ranks)
    ]


def test_each_rank_takes_its_slice_of_consecutive_blocks_and_the_rest_is_dropped() -> None:
    first, second = ([[sample for _, sample in batch] for batch in rank] for rank in batches_of(2))
    assert first == [[100, 101], [104, 105], [108, 109], [112, 113]]
    assert second == [[102, 103], [106, 107], [110, 111], [114, 115]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_read_the_order_once(ranks: int) -> None:
    read = [pair for step in zip(*batches_of(ranks, count=24, size=2)) for batch in step for pair in batch]
    assert read == list(enumerate(range(100, 124))), "and each sample keeps its place in the order"


def test_consumed_samples_continue_where_a_run_stopped() -> None:
    whole, rest = batches_of(2), batches_of(2, consumed=8)
    assert [rank[2:] for rank in whole] == rest
    assert batches_of(2, consumed=19) == [[], []]
