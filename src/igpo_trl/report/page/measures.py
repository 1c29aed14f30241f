"""What is measured of a rollout or of a group, and means with their intervals."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ...trajectory import Trajectory
from ..text import question_text

#: Reward functions that compare the answer with the right one, in the order in which they are looked for.
ANSWER_REWARDS = ("answer_reward", "f1")
#: A gain or a difference of beliefs below this is none.
NOTHING = 0.01


class Question(NamedTuple):
    """What identifies a question in several runs."""

    data_set: str
    text: str


class Estimate(NamedTuple):
    """A mean with its 95 % interval; `low` and `high` are `None` for a single value."""

    mean: float
    low: float | None
    high: float | None


def question_of(trajectory: Trajectory) -> Question:
    """The question of a rollout, with the data set if it is known."""
    return Question(trajectory.data_set or "", question_text(trajectory))


def group_of(trajectory: Trajectory) -> tuple[int, int, Question]:
    """What the rollouts of a group share. In an evaluation these are the samples of a question."""
    return trajectory.step, trajectory.group, question_of(trajectory)


def outcome_of(trajectory: Trajectory) -> float | None:
    """The outcome, unless it is not a number or infinite."""
    outcome = trajectory.outcome
    return outcome if outcome is not None and math.isfinite(outcome) else None


def score_of(trajectory: Trajectory) -> float | None:
    """The reward that compares the answer with the right one if there is one, else the outcome."""
    rewards = (trajectory.rewards.get(name) for name in ANSWER_REWARDS)
    return next((reward for reward in rewards if reward is not None), outcome_of(trajectory))


def grade_of(trajectory: Trajectory) -> str | None:
    """`"right"` if the answer is right in full, `"partly"` if it has a part of the reward, `"wrong"` if none."""
    if (score := score_of(trajectory)) is None:
        return None
    return "right" if score > 1 - 1e-6 else "partly" if score > 1e-6 else "wrong"


def is_right(trajectory: Trajectory) -> bool | None:
    """Whether the answer is right in full."""
    grade = grade_of(trajectory)
    return None if grade is None else grade == "right"


def reward_line(rollouts: Sequence[Trajectory]) -> str:
    """What a reward means, if it is the comparison of the answer with the right one and nothing else."""
    pairs = [(outcome_of(rollout), score_of(rollout)) for rollout in rollouts]
    if not all(a is not None and b is not None and abs(a - b) < 1e-6 and -1e-6 < b < 1 + 1e-6 for a, b in pairs):
        return ""
    name = "F1" if all(rollout.rewards.get("f1") is not None for rollout in rollouts) else ""
    partly = any(grade_of(rollout) == "partly" for rollout in rollouts)
    means = "1 right, between 0 and 1 partly right, 0 wrong" if partly else "1 right, 0 wrong"
    return f"Reward: {name + ' of the answer, ' if name else ''}{means}."


def gain_meaning(rollouts: Sequence[Trajectory], most: int = 2000) -> str | None:
    """Whether recorded gains are rises of the `"belief"` or of its `"logarithm"`; `"other"` if neither."""
    found: list[list[bool]] = []
    for rollout in rollouts:
        for turn, after in pairwise(rollout.turns):
            if turn.info_gain is not None and turn.belief and after.belief and len(found) < most:
                rises = after.belief - turn.belief, math.log(after.belief / turn.belief)
                found.append([abs(turn.info_gain - rise) < 1e-3 * max(1.0, abs(rise)) for rise in rises])
    if not found:
        return None
    shares = [sum(column) / len(found) for column in zip(*found, strict=True)]
    return "belief" if shares[0] > 0.99 else "logarithm" if shares[1] > 0.99 else "other"


def searches(trajectory: Trajectory) -> int:
    """Turns that were followed by an observation."""
    return sum(bool(turn.observation) for turn in trajectory.turns)


def first_and_last_belief(trajectory: Trajectory) -> tuple[float, float] | None:
    """The beliefs before the first turn and before the last turn that has one."""
    beliefs = [belief for belief in trajectory.beliefs if belief is not None]
    return (beliefs[0], beliefs[-1]) if beliefs else None


def largest_fall(trajectory: Trajectory) -> float:
    """How much the belief fell in the worst turn; 0 if it never fell."""
    beliefs = [belief for belief in trajectory.beliefs if belief is not None]
    return max((before - after for before, after in pairwise(beliefs)), default=0.0)


def all_equal(values: Iterable[Any]) -> bool:
    """Whether numbers are the same up to rounding; values that are missing count as equal."""
    present = [value for value in values if value is not None]
    return not present or max(present) - min(present) < 1e-6


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of independent values, with a t interval; `None` without values."""
    if not values:
        return None
    mean, variance = _moments(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = _t(len(values) - 1) * math.sqrt(variance / len(values))
    return Estimate(mean, mean - half, mean + half)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """The mean of `second` minus that of `first`, with Welch's interval; `None` if one of them is empty."""
    if not first or not second:
        return None
    (a, va), (b, vb) = _moments(first), _moments(second)
    if len(first) < 2 or len(second) < 2:
        return Estimate(b - a, None, None)
    va, vb = va / len(first), vb / len(second)
    freedom = (va + vb) ** 2 / (va**2 / (len(first) - 1) + vb**2 / (len(second) - 1)) if va + vb else math.inf
    half = _t(freedom) * math.sqrt(va + vb)
    return Estimate(b - a, b - a - half, b - a + half)


def separation(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    """The probability that a value labelled true is the larger one of a pair, with ties as a half (the ROC area)."""
    positive = sum(labels)
    if not 0 < positive < len(labels):
        return None
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    total = sum(float(rank) for rank, label in zip(ranks, labels, strict=True) if label)
    return (total - positive * (positive + 1) / 2) / (positive * (len(labels) - positive))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    import numpy as np

    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, squares / (len(values) - 1) if len(values) > 1 else 0.0


def _t(freedom: float) -> float:
    """The quantile of the two-sided 95 % interval."""
    from scipy.special import stdtrit

    return 1.96 if math.isinf(freedom) else float(stdtrit(freedom, 0.975))
