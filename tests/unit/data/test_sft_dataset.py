"""The split covers every sample once; an order shows every sample once an epoch and depends on the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.data.corpus import InstructionCorpus, writing_corpus
from modellink_lora.data.sft_dataset import SftDataset, sample_order, split_bounds


@pytest.mark.parametrize(
    ("split", "total", "sizes"),
    [
        ("969, 30, 1", 1000, [969, 30, 1]),
        ("949,50,1", 2000, [1898, 100, 2]),
        ("100,0,0", 7, [7, 0, 0]),
        ("1", 7, [7, 0, 0]),
        ("90/10", 10, [9, 1, 0]),
        ("0.5,0.25,0.25", 4, [2, 1, 1]),
        ("1,1,1", 10, [4, 3, 3]),  # 3 + 3 + 3 = 9: the boundaries move up by one
        ("969,30,1", 10, [10, 0, 0]),
    ],
)
def test_a_split_gives_its_proportions(split: str, total: int, sizes: list[int]) -> None:
    assert [len(part) for part in split_bounds(split, total)] == sizes


@pytest.mark.parametrize("split", ["969,30,1", "1,1,1", "1,2,4", "5,0,3", "0,1,0"])
def test_a_split_covers_every_sample_once(split: str) -> None:
    for total in range(60):
        assert [i for part in split_bounds(split, total) for i in part] == list(range(total))


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2", "1,2,3,4", "nan", "inf,1"])
def test_a_split_that_makes_no_sense_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        split_bounds(split, 10)


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    order = sample_order(50, 120, seed=7, shuffle=True)
    first, second = order[:50], order[50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert not numpy.array_equal(first, second)
    assert not numpy.array_equal(first, range(50))


def test_an_order_depends_on_the_seed_and_is_only_continued_by_more_samples() -> None:
    order = sample_order(50, 120, seed=7, shuffle=True)
    assert numpy.array_equal(order, sample_order(50, 120, seed=7, shuffle=True))
    assert numpy.array_equal(order, sample_order(50, 400, seed=7, shuffle=True)[:120])
    assert not numpy.array_equal(order, sample_order(50, 120, seed=8, shuffle=True))


def test_without_shuffle_the_file_is_read_again_and_again() -> None:
    assert sample_order(3, 7, seed=1, shuffle=False).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_full_shuffle_mixes_the_epochs_but_keeps_their_samples() -> None:
    order = sample_order(20, 60, seed=1, shuffle=True, full_shuffle=True)
    assert sorted(order) == sorted(list(range(20)) * 3)
    assert sorted(order[:20]) != list(range(20))


def test_no_sample_needed_is_no_error_but_no_sample_there_is() -> None:
    assert len(sample_order(0, 0, seed=1, shuffle=True)) == 0
    with pytest.raises(UserError, match="--split"):
        sample_order(0, 1, seed=1, shuffle=True)
    with pytest.raises(UserError, match="--no-shuffle"):
        sample_order(5, 1, seed=1, shuffle=False, full_shuffle=True)


def test_samples_are_cut_on_the_right_and_those_that_are_get_counted(tmp_path: Path) -> None:
    with writing_corpus(str(tmp_path / "set"), {}) as writer:
        for length in (2, 5, 3):
            ids = list(range(10 * length, 11 * length))
            writer.add(ids, [1] * length, [-100] + ids[1:])
    dataset = SftDataset(InstructionCorpus(str(tmp_path / "set")), range(1, 3), seq_length=3)
    assert len(dataset) == 2
    assert [part.tolist() for part in dataset[0]] == [[50, 51, 52], [-100, 51, 52]]
    assert [part.tolist() for part in dataset[1]] == [[30, 31, 32], [-100, 31, 32]]
    assert dataset.cut() == 1


@pytest.mark.parametrize(
    ("labels", "untrained"),
    [([-100, -100, 7], 0), ([-100, -100, -100, 7], 1), ([5], 1), ([5, -100], 1), ([-100, 0], 0), ([-100] * 2, 1)],
)
def test_a_sample_is_untrained_when_no_label_is_left_that_a_token_predicts(
    labels: list[int], untrained: int, tmp_path: Path
) -> None:
    with writing_corpus(str(tmp_path / "set"), {}) as writer:
        writer.add([1] * len(labels), [1] * len(labels), labels)
    assert SftDataset(InstructionCorpus(str(tmp_path / "set")), range(1), seq_length=3).untrained() == untrained
