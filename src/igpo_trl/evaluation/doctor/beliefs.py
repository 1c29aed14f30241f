"""Signatures of the beliefs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .facts import RunFacts
from .signatures import FEWEST, NotCheckedError, Seen, enough, mean, scored, share_of, signature, z_score


@signature(
    "Use harder questions (`igpo data audit`, or drop those that the model answers without a search), or a gain that "
    "still moves near 1: `info_gain='log_gap'`."
)
def belief_saturation(run: RunFacts) -> Seen:
    first = [each.beliefs[0] for each in run.recent if each.beliefs[0] is not None]
    share = share_of([belief >= 0.9 for belief in enough(first, "rollouts with beliefs")])
    if share <= 0.5:
        return None
    return (
        f"before its first turn the policy already believes in the right answer: {share:.0%} of rollouts begin with a "
        f"belief of at least 0.9 (mean {mean(first):.2f}), so no search can gain anything",
        {"share": share, "belief_first": mean(first)},
    )


@signature(
    "Compare `answer_template` with what the model writes, look at what the searches return (`igpo view`), and anchor "
    "the belief with `belief_model='reference'` or `'snapshot'`."
)
def beliefs_fall(run: RunFacts) -> Seen:
    rollouts = [each for each in scored(run.recent) if each.turns > 1]
    falls = [float(each.last_belief or 0) - float(each.beliefs[0] or 0) for each in rollouts]
    rise = mean(enough(falls, "rollouts of several turns with beliefs"))
    if rise < -0.01 and z_score(falls) < -3:
        share = share_of([fall < 0 for fall in falls])
        return (
            f"the belief in the right answer falls over a rollout, by {-rise:.3f} on average, and in {share:.0%}",
            {"rise": rise, "share": share},
        )
    before, now = ([float(each.last_belief or 0) for each in scored(some)] for some in (run.early, run.recent))
    if len(before) >= FEWEST and mean(now) < 0.7 * mean(before) and z_score(now, before) < -4:
        return (
            f"the belief before the last turn fell over training from {mean(before):.3f} to {mean(now):.3f}",
            {"belief_last_early": mean(before), "belief_last": mean(now)},
        )
    return None


@signature(
    "Write `answer_template` as the model writes its answers (`NO_THINK_TEMPLATE` if it does not think aloud), or "
    "warm-start the model on that form."
)
def template_mismatch(run: RunFacts) -> Seen:
    after = [
        float(belief)
        for each in run.recent
        if each.stated is not None and each.stated + 1 < each.turns
        if (belief := each.beliefs[each.stated + 1]) is not None
    ]
    median = float(np.median(enough(after, "observations that state the answer, followed by a belief", 16)))
    if median >= 0.05:
        return None
    return (
        f"right after an observation that states the answer, the belief in it is {median:.2g} in the median of "
        f"{len(after)} rollouts",
        {"belief_after_stated": median, "rollouts": len(after)},
    )


@signature(
    "Gains then reward the wrong turns: check `answer_template` and the aliases in `answers`, or use the outcome "
    "alone (`normalization='critic'` with `info_gain_weight=0`)."
)
def belief_without_outcome(run: RunFacts) -> Seen:
    pairs = [(float(each.last_belief or 0), each.outcome) for each in scored(run.recent) if each.outcome is not None]
    a, b = zip(*enough(pairs, "rollouts with beliefs and outcomes", 3 * FEWEST), strict=True)
    if min(np.ptp(a), np.ptp(b)) == 0:
        raise NotCheckedError("all beliefs or all outcomes are equal")
    correlation = float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])
    highest = correlation + 1.96 / len(pairs) ** 0.5
    if correlation >= 0.05 or highest >= 0.2:
        return None
    return (
        f"rollouts that end with a higher belief are not rewarded more: rank correlation {correlation:+.2f} over "
        f"{len(pairs)} rollouts",
        {"correlation": correlation, "rollouts": len(pairs)},
    )


def _ranks(values: Sequence[float]) -> Any:
    """Ranks, where equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
