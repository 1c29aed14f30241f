"""Confidence intervals and tests over questions, with SciPy. All are seeded: equal scores give equal results."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4999
_BATCH = 500  # resamples at a time, which limits the memory


class Interval(NamedTuple):
    """A mean and its confidence interval; `low` and `high` are `None` where a set has fewer than two questions."""

    mean: float
    low: float | None
    high: float | None


def bootstrap_interval(
    *sets: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """
    The mean of the means of one or more sets, with a percentile bootstrap interval over questions.

    The questions of each set are drawn with replacement from that set, so the average over several sets is a
    stratified bootstrap. Pass one value per question, the mean over its samples: this makes it a bootstrap over
    clusters.

    Args:
        sets (sequences of `float`): Values of the questions of each set.
        confidence (`float`, *optional*, defaults to `0.95`): Confidence level.
        resamples (`int`, *optional*, defaults to `4999`): Number of bootstrap samples.
        seed (`int`, *optional*, defaults to `0`): Seed of the drawing.

    Raises:
        ValueError: There is no set, or a set is empty.
    """
    from scipy.stats import bootstrap

    values = [np.asarray(scores, dtype=float) for scores in sets]
    if not values or not all(len(scores) for scores in values):
        raise ValueError("an interval needs at least one set, and every set at least one question.")
    mean = float(np.mean([scores.mean() for scores in values]))
    if min(len(scores) for scores in values) < 2:
        return Interval(mean, None, None)
    result = bootstrap(
        values,
        lambda *sets, axis: sum(scores.mean(axis=axis) for scores in sets) / len(sets),
        n_resamples=resamples,
        batch=_BATCH,
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    )
    return Interval(mean, *map(float, result.confidence_interval))


def permutation_test(*differences: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> float | None:
    """
    The two-sided p-value of "both systems score alike", from the differences of paired scores.

    Under this hypothesis, the sign of each question's difference is arbitrary. With few questions the test is exact,
    otherwise it uses `resamples` random draws. With several sets, the statistic is the mean over the sets of their
    mean differences.

    Args:
        differences (sequences of `float`): Differences of the questions, one sequence per set, none empty.
        resamples (`int`, *optional*, defaults to `4999`): Number of draws.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Returns:
        `float`, or `None` with fewer than two questions.
    """
    from scipy.stats import permutation_test as scipy_test

    sets = [np.asarray(values, dtype=float) for values in differences]
    weighted = np.concatenate([values / len(values) / len(sets) for values in sets])
    if len(weighted) < 2:
        return None
    # With a single sample, "samples" flips signs.
    options = {"permutation_type": "samples", "n_resamples": resamples, "batch": _BATCH, "rng": seed}
    return float(scipy_test((weighted,), np.sum, **options).pvalue)


def mcnemar_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """
    The two-sided p-value of the exact McNemar test on paired right (1) and wrong (0) answers.

    Only the questions on which the two systems differ count. Under the hypothesis that both are equally good, either
    system is right on such a question with probability 1/2.

    Args:
        first (sequence of `float`): One value per question.
        second (sequence of `float`): The values of the other system, in the same order.

    Returns:
        `float`, 1.0 if they never differ, or `None` if a value is neither 0 nor 1, such as a mean over samples.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        return None
    better, worse = int((b > a).sum()), int((b < a).sum())
    return float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0
