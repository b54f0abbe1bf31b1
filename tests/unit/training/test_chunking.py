from __future__ import annotations

import dataclasses

import pytest

from modellink_lora.training.chunking import Chunking, chunks_of

# seconds: a product of 10 ms in any number of chunks, sending takes 8 ms and 0.1 ms a message
EVEN = Chunking(rows=1024, products={1: 0.010, 2: 0.010, 4: 0.010}, latency=1e-4, sending=0.008)


def test_one_chunk_takes_the_sum_of_sending_and_multiplying() -> None:
    assert EVEN.seconds(1024, 1) == pytest.approx(0.0001 + 0.008 + 0.010)


def test_chunks_hide_the_shorter_of_the_two_behind_the_longer() -> None:
    # first chunk sent alone, then a product of 5 ms hides 4.1 ms of sending, then the last product
    assert EVEN.seconds(1024, 2) == pytest.approx(0.0041 + 0.005 + 0.005)
    assert EVEN(1024) == 4


def test_slow_small_products_or_messages_end_the_gain() -> None:
    assert dataclasses.replace(EVEN, products={1: 0.010, 2: 0.020, 4: 0.040})(1024) == 1
    assert dataclasses.replace(EVEN, latency=0.02)(1024) == 1


def test_the_choice_follows_the_number_of_tokens() -> None:
    assert EVEN(16) == 1  # latency is all there is
    assert EVEN(1) == 1


def test_bits_that_must_repeat_do_not_depend_on_a_measurement() -> None:
    assert [chunks_of("auto", False), chunks_of("auto", True), chunks_of("4", True)] == ["auto", "1", "4"]
