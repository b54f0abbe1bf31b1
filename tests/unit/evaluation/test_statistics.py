"""Intervals and the paired test against numbers of scipy, and against what they promise."""

from __future__ import annotations

import math
import random

import pytest

from modellink_lora.evaluation.statistics import mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [  # scipy 1.17: binomtest(right, of).proportion_ci(method="wilson")
        (3, 10, 0.10779126740630102, 0.6032218525388546),
        (293, 1199, 0.22088884812327858, 0.269484554369012),
        (0, 5, 0.0, 0.43448246478317476),
        (5, 5, 0.5655175352168251, 1.0),
    ],
)
def test_wilsons_interval_is_that_of_scipy(right: int, of: int, low: float, high: float) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [  # scipy 1.17: binomtest(better, better + worse).pvalue
        (5, 15, 0.04138946533203125),
        (15, 5, 0.04138946533203125),
        (0, 0, 1.0),
        (4, 4, 1.0),
        (1, 0, 1.0),
        (3000, 3200, 0.011488253770871584),
    ],
)
def test_mcnemars_p_is_that_of_the_binomial_test(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p, rel=1e-9)


def test_p_is_a_number_also_where_it_is_below_the_smallest_float() -> None:
    assert 0 <= mcnemar(0, 14_000) < 1e-300


def test_the_interval_of_the_difference_follows_the_published_formula() -> None:
    # Bonett and Price 2012, equation 3, with 12 gained and 2 lost of 50: p12 = 13/52, p21 = 3/52
    low, high = paired_difference(12, 2, 50)
    middle, error = 10 / 52, math.sqrt((16 / 52 - (10 / 52) ** 2) / 52)
    assert (low + high) / 2 == pytest.approx(middle)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=1e-4)


def test_the_interval_of_the_difference_turns_round_with_the_models_and_stays_within_one() -> None:
    low, high = paired_difference(7, 3, 40)
    assert paired_difference(3, 7, 40) == pytest.approx((-high, -low))
    assert paired_difference(1, 0, 1)[1] <= 1.0
    assert paired_difference(9, 0, 9)[0] > 0 > paired_difference(1, 1, 9)[0]


def test_the_interval_of_the_difference_holds_the_true_one_19_times_of_20() -> None:
    drawn = random.Random(0)
    held, rounds, of = 0, 2000, 60
    for _ in range(rounds):
        outcomes = drawn.choices((1, -1, 0), (0.2, 0.1, 0.7), k=of)
        low, high = paired_difference(outcomes.count(1), outcomes.count(-1), of)
        held += low <= 0.1 <= high
    assert 0.93 < held / rounds < 0.985
