"""Signatures of what the turns are trained with."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .facts import Facts, RunFacts
from .signatures import FEWEST, NotCheckedError, Seen, enough, groups_of, mean, rises_of, share_of, signature, z_score


@signature(
    "Raise `info_gain_weight`, lower `std_floor`, or use `normalization='critic'`, which needs no difference between "
    "the outcomes of a group."
)
def advantage_collapse(run: RunFacts) -> Seen:
    flags = []
    for group in groups_of(run.recent):
        advantages = [abs(x) for each in group for x in each.advantages if x is not None]
        rises = [b - a for a, b in rises_of(group)]
        if advantages and len(rises) > 1 and max(rises) - min(rises) > 0.02:
            flags.append(max(advantages) < 0.02)
    share = share_of(enough(flags, "groups with advantages and different gains", 8))
    if share <= 0.3:
        return None
    return (
        f"in {share:.0%} of {len(flags)} groups no turn has an advantage above 0.02, although their gains differ",
        {"share": share, "groups": len(flags)},
    )


@signature(
    "Use `normalization='critic'` or `'returns'`, which charge nothing for a turn; `'joint'`, `'separate'` and "
    "`'per_turn'` do. See the turn tax in docs/method.md."
)
def turn_tax(run: RunFacts) -> Seen:
    logged, when = run.logged("credit/turn_price", recent=False), ""
    shrunk = run.early and mean([each.turns for each in run.recent]) < 0.85 * mean([each.turns for each in run.early])
    try:
        price, known = _price(run.logged("credit/turn_price"), run.recent)
    except NotCheckedError:
        if not shrunk:
            raise
        price, known = 0.0, False
    if shrunk and price <= 0.2:
        # Once nobody searches any more, the end of a run does not show what searching cost.
        price, known = _price(logged[: len(logged) // 4], run.early)
        when = " in the first steps"
    # An estimate is a little below 0 where λ discounts what comes late.
    if price <= 0.2 and (price >= -0.2 or not known):
        return None
    numbers = {"turn_price": price}
    text = (
        f"a further turn that changes nothing {'costs' if price > 0 else 'earns'} {abs(price):.2f} in units of the "
        f"advantage ({'logged' if known else 'estimated from the advantages'}{when})"
    )
    if run.early:
        by_step = defaultdict(list)
        for each in run.rollouts:
            by_step[each.step].append(each.turns)
        shortest = min(by_step, key=lambda step: mean(by_step[step]))
        before, least = mean([each.turns for each in run.early]), mean(by_step[shortest])
        now = mean([each.turns for each in run.recent])
        numbers |= {"turns_early": before, "turns_least": least, "turns": now}
        text += f"; turns per rollout: first {before:.2f}, fewest {least:.2f} (step {shortest}), now {now:.2f}"
    return text, numbers


def _price(logged: Sequence[float], rollouts: Sequence[Facts]) -> tuple[float, bool]:
    """The price of a turn in some steps, and whether it was logged."""
    known = len(logged) > 3  # a few values may be anything
    return (float(np.median(logged)) if known else turn_price_of(rollouts)), known


def turn_price_of(rollouts: Sequence[Facts]) -> float:
    """
    The price of a turn, read off the advantages: by how much the first turn's advantage is lower, within a group, for
    each further turn, other things (outcome, rise of the belief) being equal.
    """
    rows, values = [], []
    for group in groups_of(rollouts):
        known = [each for each in group if each.advantages[0] is not None and each.outcome is not None]
        if len(known) > 1:
            x = np.array(
                [[each.turns, each.outcome, (each.last_belief or 0) - (each.beliefs[0] or 0)] for each in known]
            )
            y = np.array([each.advantages[0] for each in known], dtype=float)
            rows.append(x - x.mean(axis=0))
            values.append(y - y.mean())
    enough([x for row in rows for x in row], "rollouts with advantages in groups", 4 * FEWEST)
    x, y = np.concatenate(rows), np.concatenate(values)
    if not np.ptp(x[:, 0]):
        raise NotCheckedError("all rollouts of a group have equally many turns")
    return -float(np.linalg.lstsq(x, y, rcond=None)[0][0])


@signature(
    "Something makes turns expensive: see `credit/turn_price` (`normalization='critic'` charges nothing), and the "
    "signatures `format_penalty` and `truncation`; raise `info_gain_weight`, so that searches are worth more."
)
def turn_shortening(run: RunFacts) -> Seen:
    before, now = [each.turns for each in run.early], [each.turns for each in run.recent]
    enough(before, "rollouts at the beginning of a run of several steps")
    fell = mean(now) < 0.85 * mean(before) and mean(before) - mean(now) > 0.3 and z_score(now, before) < -4
    outcomes = [[each.outcome for each in some if each.outcome is not None] for some in (run.early, run.recent)]
    enough(min(outcomes, key=len), "outcomes at the beginning or the end")
    if not fell or mean(outcomes[1]) > 1.1 * mean(outcomes[0]):
        return None
    return (
        f"rollouts became shorter, from {mean(before):.2f} to {mean(now):.2f} turns, and the outcome did not rise "
        f"({mean(outcomes[0]):.3f} to {mean(outcomes[1]):.3f})",
        {
            "turns_early": mean(before),
            "turns": mean(now),
            "outcome_early": mean(outcomes[0]),
            "outcome": mean(outcomes[1]),
        },
    )
