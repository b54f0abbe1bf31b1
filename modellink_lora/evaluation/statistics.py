"""The few lines of statistics that a comparison of two models on the same questions needs. Pure."""

from __future__ import annotations

import math

Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953), good for small numbers too."""
    if of == 0:
        return 0.0, 1.0
    share, weight = right / of, Z * Z / of
    middle = (share + weight / 2) / (1 + weight)
    reach = Z / (1 + weight) * math.sqrt(share * (1 - share) / of + weight / (4 * of))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def paired_difference(better: int, worse: int, of: int) -> tuple[float, float]:
    """95 % interval of (better - worse) / of for paired answers (Bonett and Price 2012, doi:10.3102/1076998611411915).

    Wald's interval after one question is added to each of the two numbers, which keeps its coverage near 95 % also for
    few questions. Questions that both models answer alike say nothing about the difference but that there are `of`.
    """
    gained, lost = (better + 1) / (of + 2), (worse + 1) / (of + 2)
    middle = gained - lost
    reach = Z * math.sqrt((gained + lost - middle * middle) / (of + 2))
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p (McNemar 1947, doi:10.1007/BF02295996): a binomial test that both numbers have one mean."""
    of, fewer = better + worse, min(better, worse)
    if better == worse:
        return 1.0
    # whole numbers throughout: 2 ** of leaves the range of floats at a thousand questions, their quotient does not
    ways = total = 1
    for k in range(fewer):
        ways = ways * (of - k) // (k + 1)  # of over k + 1
        total += ways
    return 2 * total / 2**of
