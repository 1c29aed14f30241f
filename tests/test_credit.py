"""
Estimators of advantages against exact policy gradients, in the games of `games.py`.

The bounds are those that docs/method.md states; `python benchmarks/credit.py` prints the whole table.
"""

from functools import cache
from itertools import product

import numpy as np
import pytest
from games import ANSWER, BELIEFS, GAMES, measure

from igpo_trl.advantages import turn_advantages

ESTIMATORS = {
    "grpo": {"normalization": "separate", "info_gain_weight": 0.0},
    "grpo_batch": {"normalization": "separate", "info_gain_weight": 0.0, "scale": "batch"},
    "joint": {"normalization": "joint"},
    "separate": {"normalization": "separate"},
    "per_turn": {"normalization": "per_turn"},
    "returns": {"normalization": "returns"},
    "critic": {"normalization": "critic"},
    "critic_outcome": {"normalization": "critic", "info_gain_weight": 0.0},
    "critic_double": {"normalization": "critic", "info_gain_weight": 2.0},
}
WITH_GRADIENT = [name for name in GAMES if name != "search is useless"]


@cache
def quality(estimator, game, groups=16, belief="calibrated"):
    """Groups of 8."""
    generator = np.random.default_rng(groups)
    rollouts = GAMES[game].play(generator, 100 if groups == 16 else 400, groups, 8)
    return measure(rollouts, rollouts.beliefs(belief, generator), turn_advantages, **ESTIMATORS[estimator])


def cosines(estimator, **options):
    return [quality(estimator, game, **options).cosine for game in WITH_GRADIENT]


def mean_snr(estimator, **options):
    return np.mean([quality(estimator, game, **options).snr for game in WITH_GRADIENT])


# --- the oracle ------------------------------------------------------------------------------------------------------


def success_rate(game, policy):
    """By enumeration of every path of stages and actions."""

    def from_turn(k, question, stage):
        if k == game.num_turns - 1:
            return game.right[question, stage]
        total = policy[stage, ANSWER] * game.right[question, stage]
        for action, arrival in product((1, 2), range(len(policy))):
            chance = policy[stage, action] * game.found[question, action - 1, stage, arrival]
            if chance > 0:
                total += chance * from_turn(k + 1, question, arrival)
        return total

    return np.mean([from_turn(0, question, 0) for question in range(len(game.right))])


@pytest.mark.parametrize("name", GAMES)
def test_the_exact_gradient_is_that_of_the_enumerated_success_rate(name):
    game, step = GAMES[name], 1e-5
    expected = np.zeros_like(game.policy)
    for index in np.ndindex(*game.policy.shape):
        rates = []
        for sign in (1, -1):
            logits = np.log(game.policy)
            logits[index] += sign * step
            policy = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
            rates.append(success_rate(game, policy))
        expected[index] = (rates[0] - rates[1]) / (2 * step)
    np.testing.assert_allclose(game.gradient(), expected, atol=1e-9)


@pytest.mark.parametrize("name", GAMES)
def test_rollouts_are_those_of_the_game(name):
    game, generator = GAMES[name], np.random.default_rng(0)
    rollouts = game.play(generator, 400, 16, 8)
    assert rollouts.outcome.mean() == pytest.approx(success_rate(game, game.policy), abs=0.01)
    # Raw returns of a batch are an unbiased estimate of the gradient, without any estimator of this package.
    returns = np.broadcast_to(rollouts.outcome[..., None] - 0.4, rollouts.stages.shape)
    gradients = rollouts.gradients(returns)
    error = gradients.std(axis=0) / len(gradients) ** 0.5
    assert (np.abs(gradients.mean(axis=0) - game.gradient()) <= 4 * error + 1e-12).all()
    # A calibrated belief before the answer is the chance that it is right.
    last = np.take_along_axis(rollouts.beliefs("calibrated", generator), rollouts.num_turns[..., None] - 1, axis=-1)
    for belief in np.unique(last):
        at = last[..., 0] == belief
        assert rollouts.outcome[at].mean() == pytest.approx(belief, abs=4 * (0.25 / at.sum()) ** 0.5)


# --- bias ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["grpo", "grpo_batch", "returns", "critic", "critic_outcome"])
def test_points_the_way_of_the_exact_gradient(estimator):
    assert min(cosines(estimator)) >= 0.995, cosines(estimator)


@pytest.mark.parametrize("estimator", ["grpo", "returns", "critic"])
def test_points_the_way_of_the_exact_gradient_with_two_groups(estimator):
    found = cosines(estimator, groups=2)
    assert np.mean(found) >= 0.995 and min(found) >= 0.985, found  # the mean of 400 gradients is itself that noisy


@pytest.mark.parametrize(
    ("estimator", "lowest", "highest"),
    [
        ("joint", (0.2, 0.35), (0.8, 0.88)),
        ("separate", (0.75, 0.82), (0.97, 0.995)),
        ("per_turn", (0.78, 0.84), (0.89, 0.94)),
    ],
)
def test_bias_of_the_published_normalisations_is_as_documented(estimator, lowest, highest):
    found = cosines(estimator)
    assert lowest[0] <= min(found) <= lowest[1] and highest[0] <= max(found) <= highest[1], found


def test_joint_pushes_away_from_searches_that_make_no_difference():
    pushes = {name: quality(name, "search is useless").push for name in ESTIMATORS}
    assert pushes.pop("joint") < -3
    assert max(abs(push) for push in pushes.values()) < 4 / 100**0.5, pushes


# --- variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "ratio"), [(16, 1.6), (2, 1.5)])
def test_critic_has_more_signal_than_grpo(groups, ratio):
    assert mean_snr("critic", groups=groups) >= (ratio + 0.1) * mean_snr("grpo", groups=groups)
    for game in WITH_GRADIENT:  # the estimate of a single ratio is noisy
        assert quality("critic", game, groups).snr >= (ratio - 0.15) * quality("grpo", game, groups).snr
    assert mean_snr("returns", groups=groups) >= 1.4 * mean_snr("grpo", groups=groups)


def test_critic_gives_more_of_the_credit_to_the_right_turns():
    for game in WITH_GRADIENT:
        assert quality("critic", game).credit > 1.4 * quality("grpo", game).credit
        assert quality("critic", game).credit > quality("returns", game).credit
        assert quality("critic", game).one_batch > quality("grpo", game).one_batch


# --- beliefs that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("belief", "lowest"), [("overconfident", 0.975), ("noisy", 0.995), ("blind", 0.98)])
def test_critic_with_wrong_beliefs(belief, lowest):
    assert set(BELIEFS) == {"calibrated", "overconfident", "noisy", "blind", "inverted"}
    assert min(cosines("critic", belief=belief)) >= lowest
    assert mean_snr("critic", belief=belief) > 1.05 * mean_snr("grpo")


def test_why_the_weight_is_not_above_one():
    """With inverted beliefs R + w b_S is worth 1 - w times R: nothing is learnt at 1, and the opposite above it."""
    for game in WITH_GRADIENT:
        assert quality("critic_outcome", game, belief="inverted").cosine >= 0.99
        assert abs(quality("critic", game, belief="inverted").one_batch) < 0.1
        assert quality("critic_double", game, belief="inverted").cosine < -0.99
