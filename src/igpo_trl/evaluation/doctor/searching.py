"""Signatures of the searches."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from .facts import Facts, RunFacts
from .signatures import FEWEST, NotCheckedError, Seen, enough, mean, rises_of, scored, share_of, signature


@signature(
    "The searches find nothing that helps: check the index (`igpo data audit`, `igpo eval --retrieval-only`), show "
    "more (`search_k`, `search_max_words`), or warm-start the model to write better queries."
)
def searching_without_gain(run: RunFacts) -> Seen:
    rises = [b - a for a, b in rises_of(run.recent)]
    helped = share_of([rise > 0.01 for rise in enough(rises, "searches with a belief before and after", 2 * FEWEST)])
    open_questions = share_of([a < 0.9 for a, _ in rises_of(run.recent)])
    if helped >= 0.1 or mean(rises) >= 0.01 or open_questions < 0.5:
        return None
    return (
        f"of {len(rises)} searches only {helped:.0%} raise the belief by more than 0.01 (mean {mean(rises):+.4f})",
        {"helped": helped, "rise": mean(rises), "searches": len(rises)},
    )


@signature(
    "Make further turns worth less: `gamma` below 1, a lower `max_turns`, or `normalization='critic'` with "
    "`info_gain_weight=0` if gains pay for turns."
)
def over_searching(run: RunFacts) -> Seen:
    rises = enough(rises_of(run.recent), "searches with a belief before and after", 2 * FEWEST)
    # A belief that is high from the start is another signature.
    num_idle = sum(a >= 0.9 and b - a < 0.01 for each in run.recent for a, b in each.rises[1:])
    idle, each = num_idle / len(rises), num_idle / len(run.recent)
    if idle <= 0.3 or each <= 0.5:
        return None
    return (
        f"{idle:.0%} of searches begin at a belief of at least 0.9 and add nothing: {each:.1f} per rollout",
        {"share": idle, "per_rollout": each},
    )


@signature(
    "Only what is sampled can be reinforced: warm-start the model until its number of searches depends on what they "
    "find (`igpo warm-start`, more `--traces`, `--styles title`), or say in `system_prompt` when to answer. If it did "
    "at first, lower `learning_rate`, or add `beta`."
)
def blind_stopping(run: RunFacts) -> Seen:
    rollouts = [each for each in scored(run.recent) if each.turns > 1]
    ended = [each for each in rollouts if each.answered]
    enough(ended, "rollouts that searched and answered, with beliefs")
    (turns, count), *_ = Counter(each.turns for each in ended).most_common(1)
    unsure = share_of([float(each.last_belief or 0) < 0.1 for each in ended])
    after = [belief for each in rollouts for belief in each.beliefs[1:] if belief is not None]
    high = share_of([belief >= 0.5 for belief in after])
    if not 0.1 <= high <= 0.9:
        raise NotCheckedError(f"{high:.0%} of the beliefs after a search are at least 0.5, needs 10% to 90%")
    if count > 0.95 * len(rollouts) and turns != run.options.get("max_turns"):
        if unsure <= 0.3:
            return None
        return (
            f"{count / len(rollouts):.0%} of rollouts answer in turn {turns}, whatever they have read: {unsure:.0%} "
            "of them with a belief below 0.1",
            {"share": count / len(rollouts), "turns": turns, "unsure": unsure},
        )
    area, error = stopping_area(rollouts)
    if area > 0.6 or area + 2 * error > 0.7:
        return None
    return (
        "whether the policy answers or searches on hardly depends on what it has read: of two rollouts in the same "
        f"turn, the one that answers has the higher belief in {area:.0%} of pairs (by chance 50%)",
        {"area": area, "error": error},
    )


def stopping_area(rollouts: Sequence[Facts]) -> tuple[float, float]:
    """
    How well the belief tells, after a search, in which rollouts the policy answers and in which it searches on.

    Compared is within turns, since later turns have higher beliefs and more answers anyway. The area is that under the
    ROC curve: the share of pairs in which the one that answers believes more, or half a pair if both believe the same.

    Returns:
        The area, and its standard error where the belief tells nothing.

    Raises:
        NotCheckedError: Of the rollouts in a turn, all answer or all search on.
    """
    by_turn = defaultdict[int, tuple[list[float], list[float]]](lambda: ([], []))
    for each in rollouts:
        for turn, belief in enumerate(each.beliefs[1:], 1):
            ends = turn == each.turns - 1
            if belief is not None and (each.answered or not ends):
                by_turn[turn][ends].append(belief)
    higher = pairs = variance = 0.0
    for on, end in by_turn.values():
        differences = np.subtract.outer(end, on)
        higher += float(((differences > 0) + 0.5 * (differences == 0)).sum())
        pairs += differences.size
        variance += differences.size * (len(on) + len(end) + 1) / 12  # of the Mann-Whitney statistic
    if not pairs:
        raise NotCheckedError("in no turn some rollouts answer and others search on")
    return higher / pairs, variance**0.5 / pairs


@signature(
    "The policy asks again what it has asked: raise `temperature`, add `beta`, reward gains more "
    "(`info_gain_weight`), or warm-start with traces whose queries differ."
)
def self_locking(run: RunFacts) -> Seen:
    several = [each for each in run.recent if each.queries > 1]
    enough(several, "rollouts with several calls")
    share = sum(each.repeated for each in several) / sum(each.queries - 1 for each in several)
    if share <= 0.3:
        return None
    return (
        f"{share:.0%} of the calls after the first repeat an earlier call of the same rollout word for word",
        {"share": share, "rollouts": len(several)},
    )


@signature(
    "The policy writes the answer into its queries, which raises the belief without evidence: measure gains against "
    "another search (`gain_baseline='random'`), or with `info_gain='first_seen'`; lower `info_gain_weight`."
)
def answer_in_queries(run: RunFacts) -> Seen:
    asked = [each for each in run.recent if each.searchable and each.queries]
    enough(asked, "rollouts with calls and a searchable answer")
    share = sum(each.with_answer for each in asked) / sum(each.queries for each in asked)
    if share <= 0.25:
        return None
    return (
        f"{share:.0%} of the calls contain the right answer before the question or any result has stated it",
        {"share": share, "rollouts": len(asked)},
    )


@signature(
    "No search has ever found these answers: `igpo data audit QUESTIONS --index INDEX --keep answerable FILE` finds "
    "and drops questions that the corpus cannot answer."
)
def unanswerable(run: RunFacts) -> Seen:
    by_question = defaultdict(list)
    for each in run.rollouts:
        if each.searchable:
            by_question[each.question].append(each)
    searched = [some for some in by_question.values() if sum(each.searches for each in some) >= 8]
    enough(searched, "questions that were searched eight times", 16)
    never = share_of([all(each.stated is None and (each.outcome or 0) <= 0 for each in some) for some in searched])
    if never <= 0.5:
        return None
    return (
        f"of {len(searched)} questions that were searched at least eight times, {never:.0%} never had a result that "
        "states the answer, and were never answered",
        {"share": never, "questions": len(searched)},
    )
