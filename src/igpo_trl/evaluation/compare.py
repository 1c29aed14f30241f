"""Comparison of two runs on the same questions: the differences, and whether they could be chance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..rewards import Variant
from ..trajectory import Trajectory
from .intervals import Interval, bootstrap_interval, mcnemar_test, permutation_test
from .scores import AVERAGE, METRICS, question_values, without_repetition
from .tables import Table, format_p, format_percent, to_plain

RIGHT_OR_WRONG = ("em", "judge", "in_evidence", "answered")


class Difference(NamedTuple):
    """How a metric differs between two runs, on the questions that both have."""

    questions: int
    first: float  # mean of the first run
    second: float
    difference: Interval  # second minus first, with a 95 % bootstrap interval over questions
    p: float | None  # of the paired permutation test
    mcnemar: float | None  # p-value of the exact McNemar test, for right-or-wrong metrics with one sample


@dataclass(frozen=True)
class Comparison:
    """
    Two runs, compared question by question.

    Attributes:
        sets (`dict[str, dict[str, Difference]]`): by data set and metric; [`AVERAGE`] is the mean over the sets.
        only_first (`int`): number of questions in the first run only, which are left out.
        only_second (`int`): number of questions in the second run only, which are left out.
        variant (`str`): scorer of F1 and EM.
    """

    sets: dict[str, dict[str, Difference]]
    only_first: int
    only_second: int
    variant: Variant

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(to_plain(self))

    def table(self, names: tuple[str, str] = ("A", "B")) -> Table:
        """F1, EM and the judge for every set, and the other metrics for the last row's set only."""
        rows, sets = [], without_repetition(self.sets)
        for name, metrics in sets.items():
            for metric, each in metrics.items():
                if metric not in ("f1", "em", "judge") and name != list(sets)[-1]:
                    continue
                heading, form = METRICS[metric]
                mean, low, high = (_signed(form, value) for value in each.difference)
                values = [form(each.first), form(each.second), mean, f"[{low}, {high}]" if low else ""]
                rows.append(
                    [f"{name}: {heading}", str(each.questions), *values, format_p(each.p), format_p(each.mcnemar)]
                )
        note = (
            f"F1 and EM ({self.variant}) in percent; n questions; 95 % bootstrap intervals over questions; p of the "
            "paired permutation test and of the exact McNemar test. Questions in one run only, left out: "
            f"{self.only_first} (A), {self.only_second} (B)."
        )
        header = ["Set and metric", "n", *names, "B - A", "95 %", "p", "McNemar"]
        return Table(f"{names[0]} and {names[1]}", header, rows, note)


def compare_runs(
    first: Sequence[Trajectory], second: Sequence[Trajectory], variant: Variant = "squad", seed: int = 0
) -> Comparison:
    """
    Compares two runs on the questions that both have, paired by data set and id.

    Args:
        first (sequence of [`Trajectory`]): Rollouts of the first run. Several samples of a question count as their
            mean.
        second (sequence of [`Trajectory`]): Rollouts of the second run.
        variant (`str`, *optional*, defaults to `"squad"`): Scorer, `"squad"` or `"reference"`.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap and of the permutation test.

    Raises:
        ValueError: The runs have no question in common, or a question has different answers in the two.
    """
    _check_answers(first, second)
    values = [question_values(run, variant) for run in (first, second)]
    questions = [{(name, q) for name, metrics in run.items() for q in metrics["f1"]} for run in values]
    if not questions[0] & questions[1]:
        raise ValueError(
            f"the runs have no question in common: {len(questions[0])} and {len(questions[1])} questions of "
            f"{', '.join(sorted(values[0]))} and {', '.join(sorted(values[1]))}."
        )
    sets: dict[str, dict[str, Difference]] = {}
    pairs: dict[str, list[tuple[list[float], list[float]]]] = {metric: [] for metric in METRICS}
    for name in sorted(values[0].keys() & values[1].keys()):
        differences = {}
        for metric in METRICS:
            a, b = (run[name].get(metric, {}) for run in values)
            if common := sorted(a.keys() & b.keys()):
                pair = [a[q] for q in common], [b[q] for q in common]
                pairs[metric].append(pair)
                differences[metric] = _difference([pair], seed, metric in RIGHT_OR_WRONG)
        if differences:
            sets[name] = differences
    if len(sets) == 1:
        sets[AVERAGE] = next(iter(sets.values()))
    else:
        sets[AVERAGE] = {metric: _difference(of_sets, seed) for metric, of_sets in pairs.items() if of_sets}
    return Comparison(sets, len(questions[0] - questions[1]), len(questions[1] - questions[0]), variant)


def _difference(
    pairs: Sequence[tuple[list[float], list[float]]], seed: int, right_or_wrong: bool = False
) -> Difference:
    """The difference of a metric, from the paired values of one or more sets with equal weights."""
    differences = [[y - x for x, y in zip(a, b, strict=True)] for a, b in pairs]
    first, second = (sum(sum(pair[i]) / len(pair[i]) for pair in pairs) / len(pairs) for i in (0, 1))
    return Difference(
        questions=sum(map(len, differences)),
        first=first,
        second=second,
        difference=bootstrap_interval(*differences, seed=seed),
        p=permutation_test(*differences, seed=seed),
        mcnemar=mcnemar_test(*pairs[0]) if right_or_wrong else None,
    )


def _check_answers(first: Sequence[Trajectory], second: Sequence[Trajectory]) -> None:
    answers = {(t.info.get("dataset"), t.info.get("id")): t.answers for t in first if "id" in t.info}
    for trajectory in second:
        dataset, name = trajectory.info.get("dataset"), trajectory.info.get("id")
        expected = answers.get((dataset, name), trajectory.answers)
        if set(expected) != set(trajectory.answers):
            raise ValueError(
                f"question {name} of {dataset} has the answers {expected} in the first run and "
                f"{trajectory.answers} in the second: the runs are not on the same questions."
            )


def _signed(form: Callable[[float], str], value: float | None) -> str:
    """A value, with a plus sign before a percentage that is not negative."""
    return "" if value is None else f"{'+' if form is format_percent and value >= 0 else ''}{form(value)}"
