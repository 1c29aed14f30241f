"""Which questions a run lost and which it gained."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ...trajectory import Trajectory
from .measures import Question, first_and_last_belief, is_right, largest_fall, outcome_of, question_of

Runs = Mapping[str, Sequence[Trajectory]]
Entries = list[dict[str, Any]]

BELIEVED = 0.5
SMALL = 0.1  # a change of the belief that is worth no entry


#: What happened in a rollout that did not end right.
FATES = ("answered otherwise", "pulled away", "never found")


def fate_of(rollout: Trajectory) -> str | None:
    """Where a rollout that is not right lost the answer, by its beliefs; `None` where they do not say."""
    if any(belief is None for belief in rollout.beliefs) or is_right(rollout) is not False:
        return None
    if (rollout.beliefs[-1] or 0.0) >= BELIEVED:
        return FATES[0]
    return FATES[1] if max(belief or 0.0 for belief in rollout.beliefs) >= BELIEVED else FATES[2]


def shared(runs: Runs) -> set[Question]:
    """The questions with a reward that all runs have."""
    return set.intersection(*({*by_question(rollouts)} for rollouts in runs.values()))


def by_question(rollouts: Sequence[Trajectory], last: bool = True) -> dict[Question, float]:
    """The mean outcome of each question in the last step, or in the first, in which it came up."""
    values: dict[Question, tuple[int, list[float]]] = {}
    for rollout in rollouts:
        if (outcome := outcome_of(rollout)) is None:
            continue
        question = question_of(rollout)
        step, outcomes = values.get(question, (rollout.step, []))
        if step == rollout.step:
            outcomes.append(outcome)
        elif (rollout.step > step) == last:
            step, outcomes = rollout.step, [outcome]
        values[question] = step, outcomes
    return {question: sum(outcomes) / len(outcomes) for question, (_, outcomes) in values.items()}


def lost_and_gained(runs: Runs) -> tuple[str, Entries, Entries]:
    """
    Which questions went worse and which went better, the largest change first.

    Of two runs (`"runs"`): in the second than in the first. Of a run of which most questions come up in several
    steps (`"repeated"`): in the last of these steps than in the first. Otherwise (`"beliefs"`), by what the policy
    believed: lost are rollouts that did not end right with a belief that had been high or that fell, gained those
    that ended right with a belief that had risen.
    """
    if len(runs) == 2:
        before, after = runs.values()
        return "runs", *_changes(by_question(before), by_question(after), after)
    rollouts = next(iter(runs.values()))
    steps = defaultdict(set)
    for rollout in rollouts:
        steps[question_of(rollout)].add(rollout.step)
    repeated = {question for question, seen in steps.items() if len(seen) > 1}
    if len(repeated) * 2 > len(steps):
        again = [rollout for rollout in rollouts if question_of(rollout) in repeated]
        return "repeated", *_changes(by_question(again, last=False), by_question(again), again)
    return "beliefs", *_turned(rollouts)


def _changes(
    first: Mapping[Question, float], second: Mapping[Question, float], after: Sequence[Trajectory]
) -> tuple[Entries, Entries]:
    last: dict[Question, list[Trajectory]] = {}
    for rollout in after:
        place = last.setdefault(question_of(rollout), [])
        if place and rollout.step > place[0].step:
            place.clear()
        if not place or rollout.step == place[0].step:
            place.append(rollout)
    entries: Entries = [
        {
            "question": question,
            "before": before,
            "after": second[question],
            "fate": _common_fate(last[question]),
            "step": last[question][0].step,
        }
        for question, before in first.items()
        if question in second and abs(second[question] - before) > 1e-6
    ]
    entries.sort(key=lambda entry: entry["after"] - entry["before"])
    return (
        [entry for entry in entries if entry["after"] < entry["before"]],
        [entry for entry in reversed(entries) if entry["after"] > entry["before"]],
    )


def _common_fate(rollouts: Sequence[Trajectory]) -> str | None:
    """What happened in all rollouts that are not right, if it is the same."""
    fates = {fate_of(rollout) for rollout in rollouts if is_right(rollout) is False}
    return fates.pop() if len(fates) == 1 else None


def _turned(rollouts: Sequence[Trajectory]) -> tuple[Entries, Entries]:
    lost: dict[Question, dict[str, Any]] = {}
    gained: dict[Question, dict[str, Any]] = {}
    for place, rollout in enumerate(rollouts):
        pair, right = first_and_last_belief(rollout), is_right(rollout)
        if pair is None or right is None:
            continue
        question, highest = question_of(rollout), max(belief for belief in rollout.beliefs if belief is not None)
        size = pair[1] - pair[0] if right else max(highest if highest >= BELIEVED else 0.0, largest_fall(rollout))
        kept = gained if right else lost
        if size > max(SMALL, kept[question]["size"] if question in kept else 0):
            before = pair[0] if right else highest
            kept[question] = {
                "question": question,
                "before": before,
                "after": pair[1],
                "size": size,
                "fate": fate_of(rollout),
                "step": rollout.step,
                "place": place,
            }
    by_size = (sorted(kept.values(), key=lambda entry: -entry["size"]) for kept in (lost, gained))
    return next(by_size), next(by_size)
