"""Signatures of the searches."""

from collections import defaultdict

from .facts import RunFacts
from .signatures import FEWEST, Seen, enough, mean, rises_of, share_of, signature


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
