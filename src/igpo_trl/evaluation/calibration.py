"""How far beliefs can be trusted: the teacher-forced belief against the share of right answers that are sampled."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..trajectory import Trajectory, key_of
from .curves import Point, Reliability, reliability_of
from .tables import Table, format_number, format_percent

#: Where the shares of a rollout are in its `info`: one for each turn, in the state before it.
CALIBRATION = "right_if_answered"
ALL = "all"
#: How the beliefs in several aliases become one, as `alias_reduction` of the trainer does it.
REDUCTIONS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "first": lambda beliefs: beliefs[0],
    "max": max,
    "mean": lambda beliefs: sum(beliefs) / len(beliefs),
}


class Calibration(NamedTuple):
    """
    Beliefs of the states of one data set against the answers sampled in them.

    Attributes:
        states (`int`): states with a belief and samples.
        belief, right (`float`): mean belief, and share of right answers.
        brier (`float`): Brier score of the belief as a forecast of a sampled answer's being right.
        error (`float`): expected calibration error, in ten bins.
        rank_correlation (`float` or `None`): Spearman's, of belief and share; `None` if either is the same for all.
    """

    states: int
    belief: float
    right: float
    brier: float
    error: float
    rank_correlation: float | None


def states_of(rollouts: Sequence[Trajectory], reduction: str | None = None) -> dict[str, list[Point]]:
    """
    Belief, share of right answers and question of every state, by data set, and of all under [`ALL`].

    With a reduction of [`REDUCTIONS`], the belief is made from those in the aliases; else it is the one of the run.
    """
    points: dict[str, list[Point]] = defaultdict(list)
    for rollout in rollouts:
        key = key_of(rollout)
        question = (0, 0, f"{key.dataset}\n{key.id}")
        beliefs: Sequence[float | None] = rollout.beliefs
        if reduction is not None:
            beliefs = [_reduced([b for b in turn.alias_beliefs if b is not None], reduction) for turn in rollout.turns]
        for belief, share in zip(beliefs, rollout.info.get(CALIBRATION) or (), strict=False):
            if belief is not None and share is not None:
                points[key.dataset].append(Point(belief, share, question))
    points = dict(sorted(points.items()))
    return points | ({ALL: [point for of_set in points.values() for point in of_set]} if len(points) > 1 else {})


def _reduced(beliefs: Sequence[float], reduction: str) -> float | None:
    return REDUCTIONS[reduction](beliefs) if beliefs else None


def calibrate(rollouts: Sequence[Trajectory], reduction: str | None = None) -> dict[str, Calibration]:
    """
    The [`Calibration`] of each data set that has been sampled, and of all; empty if none has.

    Args:
        rollouts (list of [`Trajectory`]): Of an evaluation with `calibration`.
        reduction (`str`, *optional*): One of [`REDUCTIONS`], instead of the belief that the run used.
    """
    results = {}
    for name, points in states_of(rollouts, reduction).items():
        result = reliability_of(points)
        correlation = result.rank_correlation
        results[name] = Calibration(
            len(points),
            sum(point.belief for point in points) / len(points),
            sum(point.outcome for point in points) / len(points),
            # The mean of (belief - 1)² over the right samples and of belief² over the wrong ones.
            sum(p.belief**2 - 2 * p.belief * p.outcome + p.outcome for p in points) / len(points),
            result.error,
            None if math.isnan(correlation) else correlation,
        )
    return results


def calibration_table(results: Mapping[str, Calibration]) -> Table:
    """The results as a table."""
    header = ["Set", "States", "Belief", "Right", "Brier", "Calibration error", "Rank correlation"]
    rows = [
        [
            name,
            str(each.states),
            format_percent(each.belief),
            format_percent(each.right),
            f"{each.brier:.3f}",
            f"{each.error:.3f}",
            "" if each.rank_correlation is None else format_number(each.rank_correlation),
        ]
        for name, each in results.items()
    ]
    note = "Belief in the right answer, and share of right answers sampled in the same states, in percent."
    return Table("Calibration of beliefs", header, rows, note)


def reduction_table(rollouts: Sequence[Trajectory]) -> Table | None:
    """The calibration of each way to reduce aliases to one belief; `None` if no answer has several."""
    if not any(len(turn.alias_beliefs) > 1 for rollout in rollouts for turn in rollout.turns):
        return None
    results = {name: calibrate(rollouts, name) for name in REDUCTIONS}
    rows = [
        [name, reduction, f"{each.brier:.3f}", f"{each.error:.3f}", format_number(each.rank_correlation)]
        for name in results["max"]
        for reduction in REDUCTIONS
        if (each := results[reduction][name]).rank_correlation is not None
    ]
    header = ["Set", "`alias_reduction`", "Brier", "Calibration error", "Rank correlation"]
    note = "The same states, and the same shares of right answers."
    return Table("Calibration by alias reduction", header, rows, note) if rows else None


def reliabilities(rollouts: Sequence[Trajectory]) -> dict[str, Reliability]:
    """What the reliability plot shows, by data set."""
    return {name: reliability_of(points) for name, points in states_of(rollouts).items() if name != ALL}
