"""A run in figures: its verdict, curves over the steps, beliefs and gains by turn, and questions lost and gained."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...trajectory import Trajectory
from ..text import format_belief
from .measures import (
    Estimate,
    all_equal,
    difference,
    estimate,
    first_and_last_belief,
    gain_meaning,
    grade_of,
    group_of,
    is_right,
    outcome_of,
    quantiles,
    question_of,
    reward_line,
    searches,
    separation,
)
from .questions import BELIEVED, FATES, Runs, by_question, lost_and_gained, shared

NO_REWARD = "No reward was recorded."
MAX_POINTS = 40  # of a curve; more steps are drawn together
MAX_TURNS = 12
MAX_QUESTIONS = 200  # in a list
FIRM = 0.25  # of a difference, which the nearer end of its interval has to reach
FEW = 5  # rollouts that a point of the charts by turn needs


class Groups(NamedTuple):
    """Rollouts by group; those of a group were sampled from the same prompt."""

    groups: list[list[Trajectory]]

    @classmethod
    def of(cls, rollouts: Sequence[Trajectory]) -> "Groups":
        by_key = defaultdict(list)
        for rollout in rollouts:
            by_key[group_of(rollout)].append(rollout)
        return cls(list(by_key.values()))

    def outcomes(self) -> list[float]:
        """The mean outcome of each group: rollouts of a group are not independent, groups are."""
        return self.means([[outcome_of(rollout) for rollout in group] for group in self.groups])

    @staticmethod
    def means(values: Sequence[Sequence[float | None]]) -> list[float]:
        """Means of groups, without missing values and without groups that have nothing else."""
        present = [[value for value in group if value is not None] for group in values]
        return [sum(group) / len(group) for group in present if group]


def figures(runs: Runs) -> dict[str, Any]:
    """Everything that the page says about whole runs, as plain values for JSON."""
    everything, count = runs, 0
    if len(runs) == 2:
        common = shared(runs)
        count = len(common)
        if common and not all(len(steps_of(rollouts)) > 1 for rollouts in runs.values()):
            runs = {
                name: [each for each in rollouts if question_of(each) in common] for name, rollouts in runs.items()
            }
    kind, lost, gained = lost_and_gained(runs)
    rollouts = [each for run in runs.values() for each in run]
    return {
        "verdict": verdict(runs, kind, len(lost), len(gained)),
        "reward": reward_line(rollouts),
        "gain": gain_meaning(rollouts),
        "shared": count,
        "counted": [len(run) for run in runs.values()] if runs is not everything else None,
        "facts": [facts(rollouts) for rollouts in runs.values()],
        "curves": [curve(rollouts) for rollouts in runs.values()],
        "turns": [by_turn(rollouts) for rollouts in runs.values()],
        "stops": [stop_reasons(rollouts) for rollouts in runs.values()],
        "sets": [by_data_set(rollouts) for rollouts in runs.values()],
        "questions": {
            "kind": kind,
            "counts": [len(lost), len(gained)],
            "fates": {fate: several for fate in FATES if (several := sum(entry["fate"] == fate for entry in lost))},
            "lost": lost[:MAX_QUESTIONS],
            "gained": gained[:MAX_QUESTIONS],
        },
    }


def steps_of(rollouts: Sequence[Trajectory]) -> list[int]:
    """The steps of a run, ascending."""
    return sorted({rollout.step for rollout in rollouts})


def first_and_last_fifth(rollouts: Sequence[Trajectory]) -> tuple[list[Trajectory], list[Trajectory]]:
    """The rollouts of the first and of the last fifth of the steps, of one step each at least."""
    steps = steps_of(rollouts)
    count = max(1, len(steps) // 5)
    early, late = set(steps[:count]), set(steps[-count:])
    return [each for each in rollouts if each.step in early], [each for each in rollouts if each.step in late]


# ------------------------------------------------------------------------------------------------------------- verdict


def verdict(runs: Runs, kind: str, lost: int, gained: int) -> dict[str, Any]:
    """One sentence with numbers, `good`, `bad` or `unclear` (`likely good` if barely so), and what else to know."""
    training = all(len(steps_of(rollouts)) > 1 for rollouts in runs.values())
    if len(runs) == 2:
        headline, tone, notes = _compared(runs, lost, gained)
        over = "groups of one run each" if training or not shared(runs) else "the shared questions of one run each"
    else:
        headline, tone, notes = _of_one(next(iter(runs.values())))
        over = "groups (the rollouts of one question in one step) of one run" if training else "questions of one run"
    basis = f"The interval is over {over}; it says nothing about another seed."
    if training:
        basis += " It is the reward on training questions."
    if "95 %" not in headline:
        basis = ""
    if kind == "repeated":
        notes.append(f"Of the questions that came up again, {gained} went better the last time and {lost} worse.")
    return {"headline": headline, "tone": tone, "notes": notes, "basis": basis}


def _of_one(rollouts: Sequence[Trajectory]) -> tuple[str, str, list[str]]:
    if len(steps_of(rollouts)) > 1:
        early, late = first_and_last_fifth(rollouts)
        before, after = Groups.of(early).outcomes(), Groups.of(late).outcomes()
        change = difference(before, after)
        if change is None:
            return NO_REWARD, "unclear", []
        tone = _tone(change)
        word = {
            "good": "It learned",
            "likely good": "It probably learned",
            "bad": "It got worse",
            "likely bad": "It probably got worse",
            "unclear": "No clear change",
        }[tone]
        fifths = len(steps_of(rollouts)) > 9
        span = "the first to the last fifth of its steps" if fifths else "its first to its last step"
        a, b = sum(before) / len(before), sum(after) / len(after)
        headline = f"{word}: reward {a:.2f} → {b:.2f} ({_signed(change)}) from {span}."
        return headline, tone, [f"At the end: {note}" for note in _belief_notes(late)]
    overall, right = estimate(Groups.of(rollouts).outcomes()), [is_right(rollout) for rollout in rollouts]
    if overall is None:
        return NO_REWARD, "unclear", []
    questions = len({question_of(rollout) for rollout in rollouts})
    share = sum(map(bool, right)) / len(right)
    one_each = questions == len(rollouts)
    of = f"to {100 * share:.0f} % of" if one_each else f"in {100 * share:.0f} % of {len(rollouts):,} rollouts on"
    headline = f"Right answers {of} {questions:,} question{'s' * (questions != 1)}: reward {_plain(overall)}."
    return headline, "plain", [note[0].upper() + note[1:] for note in _belief_notes(rollouts)]


def _compared(runs: Runs, lost: int, gained: int) -> tuple[str, str, list[str]]:
    (a, first), (b, second) = runs.items()
    values = [by_question(rollouts) for rollouts in (first, second)]
    common = values[0].keys() & values[1].keys()
    training = all(len(steps_of(rollouts)) > 1 for rollouts in (first, second))
    if training:
        before, after = (Groups.of(first_and_last_fifth(rollouts)[1]).outcomes() for rollouts in (first, second))
        where = "in the last fifth of the steps"
    else:
        before, after = ([value[q] for q in common] or list(value.values()) for value in values)
        where = f"on {len(common):,} questions that both have" if common else "on different questions"
    if training or not common:
        change = difference(before, after)
    else:
        change = estimate([values[1][q] - values[0][q] for q in common])
    if change is None:
        return NO_REWARD, "unclear", []
    tone = _tone(change)
    words = {
        "good": f"{b} does better than {a}",
        "likely good": f"{b} probably does better than {a}",
        "bad": f"{b} does worse than {a}",
        "likely bad": f"{b} probably does worse than {a}",
    }
    word = words.get(tone, f"{a} or {b}: no clear difference")
    means = sum(before) / len(before), sum(after) / len(after)
    headline = f"{word}: reward {means[0]:.2f} → {means[1]:.2f} ({_signed(change)}) {where}."
    notes = []
    if common:
        same = len(common) - gained - lost
        notes.append(f"Of {len(common):,} questions, {b} gained {gained}, lost {lost}, and left {same} as they were.")
    for name, rollouts in runs.items():
        if training:
            notes.append(f"{name}: {_of_one(rollouts)[0]}")
        last = first_and_last_fifth(rollouts)[1] if training else rollouts
        notes += [f"{name}: {note}" for note in _belief_notes(last)[:1]]
    return headline, tone, notes


def _belief_notes(rollouts: Sequence[Trajectory]) -> list[str]:
    """What the policy believed, and whether that agrees with its answers."""
    scored = [(pair, is_right(rollout)) for rollout in rollouts if (pair := first_and_last_belief(rollout))]
    if not scored:
        return ["no beliefs were recorded."]
    start, end = (sum(pair[i] for pair, _ in scored) / len(scored) for i in (0, 1))
    of = f" ({len(scored):,} of {len(rollouts):,} rollouts; the others have none)"
    of = of if len(scored) < len(rollouts) else ""
    notes = [
        f"mean belief in the right answer: {format_belief(start)} before the first search, "
        f"{format_belief(end)} before the last turn{of}."
    ]
    wrong = [pair[1] for pair, right in scored if right is False]
    believed = sum(end >= BELIEVED for end in wrong)
    if wrong:
        notes.append(
            f"{believed:,} of {len(wrong):,} answers that were not right came although the policy believed in the "
            f"right one ({BELIEVED} or more)."
        )
    return notes


def _tone(change: Estimate) -> str:
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "unclear"
    tone, nearer = ("good", change.low) if change.mean > 0 else ("bad", change.high)
    return tone if abs(nearer) >= FIRM * abs(change.mean) else f"likely {tone}"


def _signed(value: Estimate) -> str:
    return _text(value, "{:+.2f}")


def _plain(value: Estimate) -> str:
    return _text(value, "{:.2f}")


def _text(value: Estimate, form: str) -> str:
    mean, *ends = (form.format(each) for each in value if each is not None)
    return f"{mean}{f', 95 % [{ends[0]}, {ends[1]}]' if ends else ''}".replace("-", "−")


def facts(rollouts: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """The figures under the headline: of an evaluation as they are, of training from the first to the last fifth."""
    if len(steps_of(rollouts)) > 1:
        early, late = map(_measure, first_and_last_fifth(rollouts))
    else:
        early, late = {}, _measure(rollouts)
    return [
        {"name": name, "before": early.get(name), "now": value}
        for name, value in late.items()
        if value is not None or early.get(name) is not None
    ]


def _measure(rollouts: Sequence[Trajectory]) -> dict[str, float | None]:
    groups = [group for group in Groups.of(rollouts).groups if len(group) > 1]
    grades = [grade for rollout in rollouts if (grade := grade_of(rollout))]
    shares = {name: grades.count(name) / len(grades) if grades else None for name in ("right", "partly", "wrong")}
    beliefs = [(pair, is_right(rollout)) for rollout in rollouts if (pair := first_and_last_belief(rollout))]
    ends = [pair[1] for pair, known in beliefs if known is not None]
    reward = estimate(Groups.of(rollouts).outcomes())
    return {
        "reward": reward and reward.mean,
        **shares,
        "believed": len(beliefs),
        "rollouts": len(rollouts),
        "belief_start": sum(pair[0] for pair, _ in beliefs) / len(beliefs) if beliefs else None,
        "belief_end": sum(pair[1] for pair, _ in beliefs) / len(beliefs) if beliefs else None,
        "separation": separation(ends, [bool(known) for _, known in beliefs if known is not None]),
        "searches": sum(map(searches, rollouts)) / len(rollouts),
        "equal": sum(_equal_outcomes(group) for group in groups) / len(groups) if groups else None,
    }


def _equal_outcomes(group: Sequence[Trajectory]) -> bool:
    return all_equal(outcome_of(rollout) for rollout in group)


def _only_gains_differ(group: Sequence[Trajectory]) -> bool:
    """Equal outcomes, but gains that differ: the group teaches nothing by outcomes alone."""
    return _equal_outcomes(group) and not all_equal(turn.info_gain for rollout in group for turn in rollout.turns)


# -------------------------------------------------------------------------------------------------------------- curves


def curve(rollouts: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """The course of training: a point per step, or per span of steps if there are many. Intervals are over groups."""
    steps = steps_of(rollouts)
    if len(steps) < 2:
        return []
    span = -(-len(steps) // MAX_POINTS)
    point_of = {step: i // span for i, step in enumerate(steps)}
    by_point = defaultdict(list)
    for rollout in rollouts:
        by_point[point_of[rollout.step]].append(rollout)
    return [_point(by_point[i], steps[i * span : (i + 1) * span]) for i in sorted(by_point)]


def _point(rollouts: Sequence[Trajectory], steps: Sequence[int]) -> dict[str, Any]:
    groups = Groups.of(rollouts)
    several = [group for group in groups.groups if len(group) > 1]
    beliefs = [[first_and_last_belief(rollout) for rollout in group] for group in groups.groups]
    return {
        "steps": [steps[0], steps[-1]],
        "rollouts": len(rollouts),
        "reward": estimate(groups.outcomes()),
        "belief_start": estimate(groups.means([[pair and pair[0] for pair in group] for group in beliefs])),
        "belief_end": estimate(groups.means([[pair and pair[1] for pair in group] for group in beliefs])),
        "searches": estimate(groups.means([list(map(searches, group)) for group in groups.groups])),
        "tokens": estimate(groups.means([[_tokens(rollout) for rollout in group] for group in groups.groups])),
        "equal": estimate([float(_equal_outcomes(group)) for group in several]),
        "only_gains": estimate([float(_only_gains_differ(group)) for group in several]),
        "stops": stop_reasons(rollouts),
    }


def _tokens(rollout: Trajectory) -> float:
    return float(sum(turn.num_tokens for turn in rollout.turns))


def stop_reasons(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """Shares of the reasons why rollouts ended."""
    counts = Counter(rollout.stop_reason or "unknown" for rollout in rollouts)
    return {reason: count / len(rollouts) for reason, count in counts.most_common()}


def by_turn(rollouts: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Of each turn: quartiles of the belief before it, of right rollouts and of others; gains; who still searches."""
    found = []
    for k in range(min(MAX_TURNS, max(len(rollout.turns) for rollout in rollouts))):
        here = [rollout for rollout in rollouts if len(rollout.turns) > k]
        if k and len(here) < FEW:
            break
        beliefs: dict[str, list[float]] = {"right": [], "not right": []}
        for rollout in here:
            if (belief := rollout.turns[k].belief) is not None and (right := is_right(rollout)) is not None:
                beliefs["right" if right else "not right"].append(belief)
        gains = [gain for rollout in here if (gain := rollout.turns[k].info_gain) is not None]
        found.append(
            {
                "beliefs": {name: [*quantiles(each), len(each)] for name, each in beliefs.items() if len(each) >= FEW},
                "gain": estimate(gains),
                "gains": len(gains),
                "searching": sum(bool(rollout.turns[k].observation) for rollout in here) / len(rollouts),
            }
        )
    return found


def by_data_set(rollouts: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """The figures of each data set, if there are several."""
    sets = defaultdict(list)
    for rollout in rollouts:
        sets[rollout.data_set or ""].append(rollout)
    return [
        {"name": name, **_measure(each), "interval": estimate(Groups.of(each).outcomes())}
        for name, each in sorted(sets.items())
        if len(sets) > 1
    ]
