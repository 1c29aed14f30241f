"""Signatures of the form, the lengths and the weights."""

from collections import defaultdict

import numpy as np

from .facts import RunFacts
from .signatures import NotCheckedError, Seen, enough, mean, share_of, signature

#: Stop reasons of rollouts that a limit of tokens has cut off.
CUT_OFF = ("length_limit", "context_limit", "turn_length_limit")


@signature(
    "Warm-start the model on the form of the answer (`igpo warm-start`), say it in `system_prompt`, and lower "
    "`format_penalty` until most rollouts have an answer."
)
def format_penalty(run: RunFacts) -> Seen:
    outcomes = [each.outcome for each in run.recent if each.outcome is not None]
    below = share_of([outcome < 0 for outcome in enough(outcomes, "rollouts with an outcome")])
    variance = float(np.var(outcomes))
    between = (
        below
        * (1 - below)
        * (mean([x for x in outcomes if x >= 0] or [0.0]) - mean([x for x in outcomes if x < 0] or [0.0])) ** 2
    )
    explained = between / variance if variance else float(below > 0)
    if below <= 0.3 or explained <= 0.5:
        return None
    return (
        f"{below:.0%} of rollouts end with a penalty, and whether they do explains {explained:.0%} of the differences "
        "between outcomes: training teaches the form, not the search",
        {"share": below, "explained": explained},
    )


@signature(
    "F1 pays for words that the right answer shares with the question, and the policy has learned to write these: set "
    "`answer_metric='em'`, and take aliases that consist of them out of `answers`."
)
def question_echo(run: RunFacts) -> Seen:
    known = [(each.echoed, each.outcome) for each in run.recent if None not in (each.echoed, each.outcome)]
    earned = [max(outcome or 0.0, 0.0) for _, outcome in enough(known, "rollouts with a question and an outcome")]
    paid = [x for x, (echoed, _) in zip(earned, known, strict=True) if echoed and x > 0]
    share, of_all = len(paid) / len(known), sum(paid) / max(sum(earned), 1e-9)
    if share <= 0.1 or of_all <= 0.15:
        return None
    return (
        f"{share:.0%} of rollouts are paid for words that are in the question already, without the right answer: "
        f"{of_all:.0%} of all that is earned",
        {"share": share, "of_all": of_all},
    )


@signature(
    "If the policy wrote them well at first, lower `learning_rate`, raise `beta`, use `normalization='critic'`, and "
    "take an earlier checkpoint. Else warm-start it (`igpo warm-start`), or take one that was trained to call tools."
)
def malformed_calls(run: RunFacts) -> Seen:
    share = share_of([each.malformed > 0 for each in enough(run.recent, "rollouts")])
    if share <= 0.2:
        return None
    numbers, text = {"share": share}, f"{share:.0%} of rollouts have a tool call that cannot be read"
    if run.early:
        numbers["share_early"] = share_of([each.malformed > 0 for each in run.early])
        text += f", and {numbers['share_early']:.0%} at first"
    return text, numbers


@signature(
    "Raise `max_completion_length` (and `max_turn_length`, or the context of the model) to what the turns need, show "
    "fewer or shorter passages (`search_k`, `search_max_words`, `max_tool_response_tokens`), or set `forced_answer`."
)
def truncation(run: RunFacts) -> Seen:
    known = [each for each in run.recent if each.stop is not None]
    share = share_of([each.stop in CUT_OFF for each in enough(known, "rollouts with a stop reason")])
    if share <= 0.2:
        return None
    turn = mean([tokens for each in known for tokens in each.sampled])
    observed = [tokens for each in known for tokens in each.observed if tokens]
    longest = max(each.turns for each in known)
    most = int(run.options.get("max_turns") or longest)
    observation = mean(observed) if observed else 0.0
    needed = most * turn + (most - 1) * observation
    limit = run.options.get("max_completion_length")
    return (
        f"a limit of tokens cuts off {share:.0%} of rollouts. {most} turns of about {turn:.0f} tokens with results of "
        f"about {observation:.0f} need {needed:.0f} tokens"
        + (f"; `max_completion_length` is {limit}" if limit else ""),
        {"share": share, "turn_tokens": turn, "observation_tokens": observation, "needed_tokens": needed},
    )


@signature("Lower `learning_rate`, raise `beta`, or take an earlier checkpoint.")
def drift(run: RunFacts) -> Seen:
    kl = run.logged("kl")
    if not kl:
        raise NotCheckedError("no `kl` in the trainer's log (`beta=0`, or no log)")
    if (now := float(np.median(kl))) <= 0.5:
        return None
    return f"the policy is {now:.2f} nats per token from its reference", {"kl": now}


@signature(
    "The weights do not change: check `learning_rate`, that the adapter's `lora_target_modules` match the model and "
    "its parameters are trainable, and that weights in bfloat16 are not too coarse for the steps."
)
def no_op(run: RunFacts) -> Seen:
    norms, rates = run.logged("grad_norm", recent=False), run.logged("learning_rate", recent=False)
    for name, values in (("grad_norm", norms), ("learning_rate", rates)):
        if len(values) > 4 and max(values) == 0:
            return f"`{name}` was 0 in all {len(values)} lines of the log", {name: 0.0}
    # A reference believes the same at every step, and so does a snapshot between two updates.
    if run.options.get("belief_model", "policy" if not run.log else None) != "policy":
        if norms:
            return None
        raise NotCheckedError("no gradient norms in the trainer's log")
    again = defaultdict(set)
    for each in run.rollouts:
        if each.beliefs[0] is not None:
            again[each.question].add((each.step, each.beliefs[0]))
    same = []
    for seen in again.values():
        if len({step for step, _ in seen}) > 1:
            values = [belief for _, belief in seen]
            same.append(max(values) - min(values) <= 1e-6 * max(values))
    if norms and len(same) < 8:
        return None
    if share_of(enough(same, "questions with beliefs at several steps", 8)) < 1:
        return None
    return f"the beliefs in {len(same)} questions are the same at every step at which they came", {
        "questions": len(same)
    }
