"""
What a policy does before it answers, by its belief, and what each decision is paid: from the records of a run.

    python benchmarks/decisions.py outputs/run [outputs/another …] [--steps 0 9]

Prints the share of pairs of rollouts, in the same turn after a search, in which the one that answers believes more
than the one that searches on; how often the policy searches on; and, of a training run, the mean advantage of these
turns beside that which GRPO with batch scaling would give the same rollouts.
"""

import argparse
import math
import statistics
from collections import defaultdict
from typing import Any

from igpo_trl.evaluation import load_run
from igpo_trl.evaluation.doctor.facts import Facts
from igpo_trl.evaluation.doctor.searching import stopping_area


def band(belief: float) -> str:
    return "below .1" if belief < 0.1 else ".1 to .9" if belief < 0.9 else "above .9"


def mean_and_error(values: list[float]) -> str:
    return f"{statistics.fmean(values):+.2f} ± {statistics.pstdev(values) / math.sqrt(len(values)):.2f}"


def grpo_advantages(rollouts: list[tuple[str, Any]]) -> list[float]:
    """(outcome - mean of its group) / standard deviation of its batch, as TRL has it."""
    groups, batches = defaultdict(list), defaultdict(list)
    for run, one in rollouts:
        groups[run, one.step, one.group].append(one.outcome)
        batches[run, one.step].append(one.outcome)
    return [
        (one.outcome - statistics.fmean(groups[run, one.step, one.group]))
        / (statistics.stdev(batches[run, one.step]) + 1e-4)
        for run, one in rollouts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--steps", type=int, nargs=2, default=(0, 10**9), help="first and last, as in the records")
    args = parser.parse_args()
    first, last = args.steps
    rollouts = [(run, one) for run in args.runs for one in load_run(run) if first <= one.step <= last]
    facts = [Facts.of(one) for _, one in rollouts]
    area, error = stopping_area([each for each in facts if each.turns > 1])
    print(f"{len(rollouts)} rollouts; the one that answers believes more in {area:.2f} ± {error:.2f} of pairs\n")

    trained = all(turn.advantage is not None for _, one in rollouts for turn in one.turns)
    grpo = grpo_advantages(rollouts) if trained else [math.nan] * len(rollouts)
    on, paid = defaultdict[tuple[int, str], list[bool]](list), defaultdict[tuple[str, str], list[Any]](list)
    for each, (_, one), other in zip(facts, rollouts, grpo, strict=True):
        for k, belief in enumerate(each.beliefs[1:], 1):
            searches_on = k < each.turns - 1
            if belief is not None and (searches_on or each.answered):
                on[k, band(belief)].append(searches_on)
                action = "searches on" if searches_on else "answers"
                paid[band(belief), action].append((each.outcome, one.turns[k].advantage, other))
    print("| searches so far | belief | decisions | share that searches on |\n|---|---|---|---|")
    for (k, belief_band), values in sorted(on.items()):
        print(f"| {k} | {belief_band} | {len(values)} | {statistics.fmean(values):.2f} |")
    if trained:
        print("\n| belief | what it does | turns | outcome | advantage | GRPO |\n|---|---|---|---|---|---|")
        for (belief_band, action), values in sorted(paid.items()):
            outcomes, advantages, others = map(list, zip(*values, strict=True))
            cells = f"{statistics.fmean(outcomes):.2f} | {mean_and_error(advantages)} | {mean_and_error(others)}"
            print(f"| {belief_band} | {action} | {len(values)} | {cells} |")


if __name__ == "__main__":
    main()
