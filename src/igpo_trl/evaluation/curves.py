"""The numbers of `igpo plot`: learning curves over seeds, beliefs by turn, the reliability of beliefs, collapse."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..trajectory import Trajectory, load_run
from .intervals import Interval, bootstrap_interval

#: Curves: the panel's title and the metric of the logs; the last two are of the figure of collapse.
CURVES = {
    "reward": ("Reward", "reward"),
    "f1": ("Held-out F1", "eval_f1"),
    "turns": ("Turns of a rollout", "rollout/turns/mean"),
    "belief": ("Belief before the last turn", "belief/final"),
    "gain": ("Gain of a turn", "info_gain/mean"),
    "collapse": ("Groups with equal outcomes", "collapse/outcome"),
    "no_advantage": ("Groups without any advantage", "collapse/advantage"),
}
COLLAPSE = ("collapse", "no_advantage")

_SEED = re.compile(r"(?:[-_. ]*(?:seed|s))?[-_. =]*\d+$", re.IGNORECASE)
_PARTS = {"train", "training", "eval", "evaluation", "trajectories"}  # folders that only say which part of a run it is
_MIN_ROLLOUTS = 10  # of a point, except where a run has fewer
_RESAMPLES = 999


@dataclass
class Run:
    """
    What a run has written.

    Attributes:
        path (`Path`): its folder, or a file of rollouts.
        rollouts (list of [`Trajectory`]): its records, in the order of their steps; empty if it kept none.
        logs (list of `dict`): its metrics, log by log, each with its `step`; empty if there are none.
    """

    path: Path
    rollouts: list[Trajectory] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)


def read_run(path: str | Path) -> Run:
    """
    Reads the rollouts of a training run, an evaluation or the sandbox, and the metrics of a training run.

    Raises:
        FileNotFoundError: There are neither.
    """
    run = Run(Path(path))
    metrics, state = run.path / "metrics.jsonl", run.path / "trainer_state.json"
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()  # the last one may be cut off
        run.logs = [json.loads(line) for line in lines]
    elif state.is_file():
        run.logs = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    try:
        run.rollouts = load_run(run.path)
    except FileNotFoundError:
        if not run.logs:
            raise
    return run


def group_runs(words: Iterable[str]) -> dict[str, list[Path]]:
    """
    The runs of each method, from words such as `outputs/igpo-seed0` or `IGPO=outputs/igpo-seed*`.

    Without a name, runs whose names differ in a number at the end only are seeds of one method. Patterns are for
    names before a `=`, where a shell does not resolve them; several are separated by commas.

    Raises:
        FileNotFoundError: A path or pattern names nothing.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for word in words:
        name, equals, patterns = word.partition("=")
        if not equals or Path(word).exists():
            paths = _resolve(word)
            name = ""
        else:
            paths = [path for pattern in patterns.split(",") for path in _resolve(pattern)]
        for path in paths:
            groups[name or _method(path)].append(path)
    return dict(groups)


def _resolve(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists():
        return [path]
    found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))) if pattern else []
    if not found:
        raise FileNotFoundError(f"no such run: {pattern}. Give folders, or NAME=FOLDER,FOLDER.")
    return found


def _method(path: Path) -> str:
    path = path.resolve()
    parts = [part for part in (path.name if path.is_dir() else path.stem, *(p.name for p in path.parents)) if part]
    name = next((part for part in parts if part.lower() not in _PARTS and not part.startswith("rank")), parts[0])
    return _SEED.sub("", name) or name


# ---------------------------------------------------------------------------------------------------------- numbers


def curves_of(run: Run) -> dict[str, dict[int, float]]:
    """Values of a training run by curve, a key of [`CURVES`], and optimizer step: from its logs, else its records."""
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for log in run.logs:
        for name, (_, metric) in CURVES.items():
            value = log.get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                curves[name][log["step"]] = float(value)
    if not curves["reward"] and {rollout.step for rollout in run.rollouts} - {0}:
        curves |= _curves_of_records(run.rollouts)
    return {name: curve for name, curve in curves.items() if curve}


def _curves_of_records(rollouts: Sequence[Trajectory]) -> dict[str, dict[int, float]]:
    steps: dict[int, list[Trajectory]] = defaultdict(list)
    for rollout in rollouts:
        steps[rollout.step + 1].append(rollout)  # logs count a step once it is done
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES if name != "f1"}
    for step, batch in steps.items():
        groups: dict[Any, list[Trajectory]] = defaultdict(list)
        for rollout in batch:
            groups[rollout.group, rollout.prompt].append(rollout)
        several = [group for group in groups.values() if len(group) > 1]
        advantages = [[t.advantage for r in group for t in r.turns if t.advantage is not None] for group in several]
        values: dict[str, list[Any]] = {
            "reward": [rollout.outcome for rollout in batch],
            "turns": [len(rollout.turns) for rollout in batch],
            "belief": [rollout.beliefs[-1] for rollout in batch],
            "gain": [turn.info_gain for rollout in batch for turn in rollout.turns],
            "collapse": [len({rollout.outcome for rollout in group}) == 1 for group in several],
            "no_advantage": [not any(group) for group in advantages if group],
        }
        for name, numbers in values.items():
            known = [float(x) for x in numbers if x is not None]
            if known:
                curves[name][step] = sum(known) / len(known)
    return curves


class Band(NamedTuple):
    """A curve over seeds; `low` and `high` are `None` with fewer than three, which give no useful interval."""

    steps: np.ndarray
    seeds: np.ndarray  # (seeds, steps)
    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


def band(curves: Sequence[Mapping[int, float]], span: int = 1) -> Band:
    """
    The mean of several runs with a 95 % interval (Student's t over runs), at the steps that all of them have.

    Args:
        curves (sequence of mapping): values by step, of each run.
        span (`int`, *optional*, defaults to `1`): values of a run to average, the latest and those before it.
    """
    steps = sorted(set.intersection(*map(set, curves)))
    seeds = np.array([[curve[step] for step in steps] for curve in curves], dtype=float)
    sums = np.cumsum(np.pad(seeds, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, len(steps) + 1)
    starts = np.maximum(ends - span, 0)
    seeds = (sums[:, ends] - sums[:, starts]) / (ends - starts)
    mean = seeds.mean(axis=0)
    if len(seeds) < 3:
        return Band(np.array(steps), seeds, mean, None, None)
    from scipy.stats import t

    half = t.ppf(0.975, len(seeds) - 1) * seeds.std(axis=0, ddof=1) / math.sqrt(len(seeds))
    return Band(np.array(steps), seeds, mean, mean - half, mean + half)


def part_of(run: Run, start: float, end: float) -> list[Trajectory]:
    """The rollouts between two shares of a run's steps, at least of one step; all of an evaluation's."""
    steps = sorted({rollout.step for rollout in run.rollouts})
    first = min(int(start * len(steps)), len(steps) - 1) if steps else 0
    chosen = set(steps[first : max(math.ceil(end * len(steps)), first + 1)])
    return [rollout for rollout in run.rollouts if rollout.step in chosen]


Question = tuple[int, int, str]


def question_of(rollout: Trajectory) -> Question:
    """What the rollouts of a group share."""
    return rollout.step, rollout.group, rollout.prompt


def over_questions(pairs: Iterable[tuple[Question, float]]) -> Interval:
    """A mean with its bootstrap interval over questions, of pairs of a question and a value."""
    by_question: dict[Question, list[float]] = defaultdict(list)
    for question, value in pairs:
        by_question[question].append(value)
    return bootstrap_interval([sum(x) / len(x) for x in by_question.values()], resamples=_RESAMPLES)


def beliefs_by_turn(rollouts: Sequence[Trajectory]) -> list[Interval]:
    """The belief before each turn, over the rollouts that have that turn; as far as enough of them do."""
    scored = [rollout for rollout in rollouts if rollout.beliefs[0] is not None]
    enough = max(1, min(_MIN_ROLLOUTS, len(scored) // 10))
    points = []
    for k in range(max((len(rollout.turns) for rollout in scored), default=0)):
        pairs = [
            (question_of(rollout), belief)
            for rollout in scored
            if len(rollout.turns) > k and (belief := rollout.beliefs[k]) is not None
        ]
        if len(pairs) < enough:
            break
        points.append(over_questions(pairs))
    return points


class Bin(NamedTuple):
    """Rollouts with similar final beliefs: their mean belief, their number, and their outcome."""

    belief: float
    number: int
    outcome: Interval


class Reliability(NamedTuple):
    """
    How far final beliefs foretell outcomes.

    Attributes:
        bins (list of [`Bin`]): by rising belief.
        error (`float`): expected calibration error, the mean distance of a bin's belief from its outcome.
        rank_correlation (`float`): Spearman's; NaN if either is the same for all.
        beliefs (list of `float`): of all rollouts.
    """

    bins: list[Bin]
    error: float
    rank_correlation: float
    beliefs: list[float]


class Point(NamedTuple):
    """A forecast, what came of it, between 0 and 1, and the question."""

    belief: float
    outcome: float
    question: Question


def reliability(rollouts: Sequence[Trajectory], limit: float = 1.0) -> Reliability | None:
    """The belief before the last turn against the outcome, between 0 and 1; `None` without both."""
    points = [
        Point(belief, min(max(rollout.outcome, 0.0), 1.0), question_of(rollout))
        for rollout in rollouts
        if (belief := rollout.beliefs[-1]) is not None and rollout.outcome is not None
    ]
    return reliability_of(points, limit) if points else None


def reliability_of(points: Sequence[Point], limit: float = 1.0, num_bins: int = 10) -> Reliability:
    """
    How far forecasts foretell what came of them.

    Args:
        points (sequence of [`Point`]): at least one.
        limit (`float`, *optional*, defaults to `1.0`): where the last bin ends; larger beliefs are in it too.
        num_bins (`int`, *optional*, defaults to `10`): bins of equal width. Those with few points are not listed, but
            count in the error.
    """
    from scipy.stats import spearmanr

    bins, error = [], 0.0
    members: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        members[min(int(point.belief / limit * num_bins), num_bins - 1)].append(point)
    for _, inside in sorted(members.items()):
        belief = sum(point.belief for point in inside) / len(inside)
        error += abs(sum(point.belief - point.outcome for point in inside)) / len(points)
        if len(inside) >= min(_MIN_ROLLOUTS, len(points) / num_bins):
            outcome = over_questions((point.question, point.outcome) for point in inside)
            bins.append(Bin(belief, len(inside), outcome))
    beliefs, outcomes = [point.belief for point in points], [point.outcome for point in points]
    constant = len(set(beliefs)) == 1 or len(set(outcomes)) == 1
    return Reliability(bins, error, math.nan if constant else float(spearmanr(beliefs, outcomes)[0]), beliefs)
