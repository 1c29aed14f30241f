"""Slow, obvious versions of the maths, written from the definitions with Python loops.

Nothing here imports `igpo_trl`: a test compares the package with these, so a mistake would have to be made twice, in
two different forms. Rollouts are plain lists, as long as the rollout is, so that there is no padding to get wrong.
"""

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# --- rewards ---------------------------------------------------------------------------------------------------------


def squad_tokens(text: str) -> list[str]:
    """SQuAD's normal form for text whose words are separated by white space or ASCII punctuation."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """Bag-of-tokens F1: each gold token can be matched once; yes, no and noanswer match only themselves."""
    best = 0.0
    for answer in answers:
        predicted, gold = squad_tokens(prediction), squad_tokens(answer)
        if predicted == gold:
            best = max(best, 1.0)
            continue
        if {" ".join(predicted), " ".join(gold)} & {"yes", "no", "noanswer"}:
            continue
        unmatched, common = list(gold), 0
        for token in predicted:
            if token in unmatched:
                unmatched.remove(token)
                common += 1
        if common:
            precision, recall = common / len(predicted), common / len(gold)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


# --- turns -----------------------------------------------------------------------------------------------------------


def turn_spans(sampled: Sequence[int]) -> tuple[list[int], list[int]]:
    """(turn of each token, -1 on observations; position where each turn begins) of one rollout without padding."""
    index, starts = [], []
    for position, is_sampled in enumerate(sampled):
        if is_sampled and (position == 0 or not sampled[position - 1]):
            starts.append(position)
        index.append(len(starts) - 1 if is_sampled else -1)
    if not sampled or not sampled[-1]:
        starts.append(len(sampled))  # the turn that was not sampled any more
    return index, starts


# --- advantages ------------------------------------------------------------------------------------------------------


def turn_advantages(
    gains: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    num_generations: int,
    normalization: str,
    gamma: float = 1.0,
    scale: str = "group",
    info_gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    std_floor: float = 1e-2,
) -> list[list[float]]:
    """
    Advantages of every turn: `gains[i]` holds one value per turn but the last, so rollout i has one turn more.

    Every pool is a list of (rollout, turn, value). A rollout without an outcome is in no pool and gets zeros, a
    missing gain is in no pool.
    """
    group_pools: list[tuple[tuple[Any, ...], list[tuple[int, int, float]]]] = []
    for first in range(0, len(outcomes), num_generations):
        pools: dict[tuple[Any, ...], list[tuple[int, int, float]]] = {}
        for i in range(first, first + num_generations):
            if math.isnan(outcomes[i]):
                continue
            for k, gain in enumerate(gains[i]):
                if not math.isnan(gain):
                    kind = {"joint": ("all",), "separate": ("gain",), "per_turn": ("gain", k)}[normalization]
                    pools.setdefault(kind, []).append((i, k, gain))
            kind = ("all",) if normalization == "joint" else ("outcome",)
            pools.setdefault(kind, []).append((i, len(gains[i]), outcomes[i]))
        group_pools.extend(pools.items())

    batch_values: dict[tuple[Any, ...], list[float]] = {}
    for kind, pool in group_pools:
        batch_values.setdefault(kind, []).extend(value for _, _, value in pool)

    z = [[0.0] * (len(rollout) + 1) for rollout in gains]
    for kind, pool in group_pools:
        values = [value for _, _, value in pool]
        if len(set(values)) == 1:
            continue
        mean = sum(values) / len(values)
        divisor = 1.0
        if scale != "none":
            divisor = max(_population_std(batch_values[kind] if scale == "batch" else values), std_floor)
        for i, k, value in pool:
            weight = outcome_weight if k == len(gains[i]) else info_gain_weight
            z[i][k] = weight * (value - mean) / divisor

    return [[sum(gamma ** (j - k) * row[j] for j in range(k, len(row))) for k in range(len(row))] for row in z]


def information_gain(
    log_beliefs: Sequence[Sequence[float]], kind: str, spans: Sequence[Sequence[tuple[int, int]]] | None = None
) -> list[list[float]]:
    """Gain of each turn, NaN where there is none, from the log-beliefs before each turn of each rollout (ragged)."""
    gains = []
    for i, rollout in enumerate(log_beliefs):
        gains.append([math.nan] * len(rollout))
        for a, b in [(k, k + 1) for k in range(len(rollout) - 1)] if spans is None else spans[i]:
            before, after = rollout[a], rollout[b]
            if kind == "log_gap":
                before, after = math.log(0.1 - after), math.log(0.1 - before)
            gains[i][b - 1] = math.exp(after) - math.exp(before) if kind == "prob_diff" else after - before
    return gains


def _population_std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def returns_advantages(
    gains: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    num_generations: int,
    gamma: float = 1.0,
    scale: str = "batch",
    info_gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    std_floor: float = 1e-2,
) -> list[list[float]]:
    """
    What follows a turn, less its mean over the others of the group that have this turn; where none has, less the mean
    of the others' outcomes. Divided by the root mean square over all turns. Arguments as in `turn_advantages`.
    """
    returns: list[list[float]] = []
    for row, outcome in zip(gains, outcomes, strict=True):
        rewards = [0.0 if math.isnan(gain) else info_gain_weight * gain for gain in row] + [outcome_weight * outcome]
        returns.append(
            [sum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards))) for k in range(len(rewards))]
        )
    result = [[0.0] * len(row) for row in returns]
    for i, row in enumerate(returns):
        first = i - i % num_generations
        others = [j for j in range(first, first + num_generations) if j != i and not math.isnan(outcomes[j])]
        if math.isnan(outcomes[i]) or not others:
            continue
        for k, value in enumerate(row):
            same = [returns[j][k] for j in others if len(returns[j]) > k] or [returns[j][-1] for j in others]
            result[i][k] = value - sum(same) / len(same)
    flat = [a for row, outcome in zip(result, outcomes, strict=True) for a in row if not math.isnan(outcome)]
    if scale == "none" or not flat:
        return result
    divisor = max(math.sqrt(sum(a * a for a in flat) / len(flat)), std_floor, 1e-300)
    return [[a / divisor for a in row] for row in result]


def critic_advantages(
    beliefs: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    num_generations: int,
    info_gain_weight: float,
    gae_lambda: float = 0.9,
    scale: bool = True,
) -> list[list[float]]:
    """
    The belief as critic, for γ = 1 and gains in probability: `beliefs[i]` has the belief before each turn 0 … S.

    The value of rollout i is a ridge fit, without rollout i, of G_k = R + w (b_S - b_k) on [1, standardised b_k, the
    square of that, standardised, one-hot k] with a penalty of 4 on all but the intercept, plus the mean residual of
    each other rollout of the group, summed and divided by their number + 4. Then GAE with
    δ_k = w (b_{k+1} - b_k) + V_{k+1} - V_k and δ_S = R - V_S, divided by the root mean square over all turns.
    """
    w = info_gain_weight
    max_turns = max(len(row) for row in beliefs)
    scored = [i for i, r in enumerate(outcomes) if not math.isnan(r)]
    read = np.array([belief for i in scored for belief in beliefs[i]])
    mean, std = read.mean(), max(float(read.std()), 1e-6)
    squares = ((read - mean) / std) ** 2
    mean_square, std_square = squares.mean(), max(float(squares.std()), 1e-6)
    features = {}
    for i, row in enumerate(beliefs):
        standardised = [(b - mean) / std for b in row]
        features[i] = np.array(
            [
                [1.0, x, (x * x - mean_square) / std_square, *(float(k == j) for j in range(max_turns))]
                for k, x in enumerate(standardised)
            ]
        )
    targets = {i: np.array([outcomes[i] + w * (row[-1] - b) for b in row]) for i, row in enumerate(beliefs)}
    penalty = np.diag([0.0] + [2.0] * (max_turns + 2))  # squared, and as so many further rows with target 0
    values = {}
    for i in scored:
        others = [j for j in scored if j != i]
        if not others:  # nothing to compare with
            values[i] = targets[i]
            continue
        rows = np.vstack([features[j] for j in others] + [penalty])
        wanted = np.concatenate([targets[j] for j in others] + [np.zeros(len(penalty))])
        coefficients, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        peers = [j for j in others if j // num_generations == i // num_generations]
        missed = [float((targets[j] - features[j] @ coefficients).mean()) for j in peers]
        values[i] = features[i] @ coefficients + sum(missed) / (len(missed) + 4)

    result = []
    for i, row in enumerate(beliefs):
        if math.isnan(outcomes[i]):
            result.append([0.0] * len(row))
            continue
        value = values[i]
        delta = [w * (row[k + 1] - row[k]) + value[k + 1] - value[k] for k in range(len(row) - 1)]
        delta.append(outcomes[i] - value[-1])
        result.append([sum(gae_lambda ** (j - k) * delta[j] for j in range(k, len(row))) for k in range(len(row))])
    if scale:
        flat = [a for i in scored for a in result[i]]
        root_mean_square = math.sqrt(sum(a * a for a in flat) / len(flat))
        result = [[a / root_mean_square for a in row] for row in result]
    return result


# --- beliefs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def beliefs(
    model: Any,
    sequences: Sequence[Sequence[int]],
    boundaries: Sequence[Sequence[int]],
    probes: Sequence[Sequence[Any]],
) -> list[list[list[float]]]:
    """Mean log-prob of the answer tokens: one forward of one unpadded sequence per (rollout, boundary, probe)."""
    training = model.training
    model.eval()
    result = []
    for sequence, cuts, rollout_probes in zip(sequences, boundaries, probes, strict=True):
        by_boundary = []
        for cut in cuts:
            by_probe = []
            for probe in rollout_probes:
                ids = [*sequence[:cut], *probe.token_ids]
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
                total = 0.0
                for position in range(cut + probe.answer_start, cut + probe.answer_end):
                    log_probs = torch.log_softmax(logits[position - 1], dim=-1)
                    total += float(log_probs[ids[position]])
                by_probe.append(total / (probe.answer_end - probe.answer_start))
            by_boundary.append(by_probe)
        result.append(by_boundary)
    model.train(training)
    return result
