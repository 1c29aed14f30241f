import json
import math
from dataclasses import dataclass

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_trl.advantages import NORMALIZATIONS, turn_advantages

NORMALISING = ["joint", "separate", "per_turn"]  # subtract a mean first, and then add up what follows
NAN = float("nan")

# Multiples of 1/64: sums of them are exact, so that equal values are equal to the oracle as well.
grid = st.integers(-64, 64).map(lambda n: n / 64)


@dataclass
class Batch:
    """Ragged rollouts: `gains[i]` has one entry per turn but the last."""

    num_generations: int
    gains: list[list[float]]
    outcomes: list[float]

    def tensors(self, extra_turns=0, garbage=0.0):
        num_turns = [len(row) + 1 for row in self.gains]
        width = max(num_turns) + extra_turns
        gains = [row + [garbage] * (width - len(row)) for row in self.gains]
        return (
            torch.tensor(gains, dtype=torch.float64),
            torch.tensor(self.outcomes, dtype=torch.float64),
            torch.tensor(num_turns),
        )

    def rows(self, order):
        return Batch(self.num_generations, [self.gains[i] for i in order], [self.outcomes[i] for i in order])


@st.composite
def batches(draw, max_groups=3, max_size=4, missing=True, gains=grid, min_size=1, max_gains=4):
    size = draw(st.integers(min_size, max_size))
    rollouts = size * draw(st.integers(1, max_groups))
    gain = st.one_of(gains, gains, gains, st.just(NAN)) if missing else gains
    outcome = st.one_of(st.sampled_from([0.0, 1.0, -2.0]), grid, *[st.just(NAN)] * missing)
    return Batch(
        size,
        draw(st.lists(st.lists(gain, max_size=max_gains), min_size=rollouts, max_size=rollouts)),
        draw(st.lists(outcome, min_size=rollouts, max_size=rollouts)),
    )


def run(batch, *, extra_turns=0, garbage=0.0, **options):
    return turn_advantages(*batch.tensors(extra_turns, garbage), batch.num_generations, **options)


def assert_rows(actual, expected, **tolerance):
    """Compare (B, K) with ragged rows; beyond a rollout's turns there must be exact zeros."""
    for row, values in zip(actual, expected, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values, dtype=row.dtype), **tolerance)
        assert (row[len(values) :] == 0).all()


# --- against the authors' code ---------------------------------------------------------------------------------------


def test_equals_the_authors_code(shared_dir):
    cases = json.loads((shared_dir / "golden" / "turn_advantages.json").read_text(encoding="utf-8"))["cases"]
    assert {case["norm_mode"] for case in cases} == {"joint", "separate"}
    for case in cases:
        assert case["group"] == sorted(case["group"])  # whole groups, one after another
        batch = Batch(case["num_generations"], case["info_gain"], case["outcome"])
        options = {"normalization": case["norm_mode"], "gamma": case["gamma"], "scale": case["scale_by_std"]}
        actual = run(batch, std_floor=0.0, **options)
        assert_rows(actual, case["turn_advantages"], atol=1e-4, rtol=0.0)


# --- against the oracle ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    batches(),
    st.sampled_from(NORMALISING),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(["group", "batch", "none"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.0, 1e-2, 0.5]),
)
def test_equals_oracle(batch, normalization, gamma, scale, info_gain_weight, outcome_weight, std_floor):
    options = {"gamma": gamma, "scale": scale, "std_floor": std_floor}
    options |= {"info_gain_weight": info_gain_weight, "outcome_weight": outcome_weight}
    actual = run(batch, normalization=normalization, **options)
    expected = oracles.turn_advantages(batch.gains, batch.outcomes, batch.num_generations, normalization, **options)
    assert_rows(actual, expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=200)
@given(
    batches(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["group", "none"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([1e-2, 0.5]),
)
def test_returns_equal_oracle(batch, gamma, scale, info_gain_weight, outcome_weight, std_floor):
    options = {"gamma": gamma, "scale": scale, "std_floor": std_floor}
    options |= {"info_gain_weight": info_gain_weight, "outcome_weight": outcome_weight}
    expected = oracles.returns_advantages(batch.gains, batch.outcomes, batch.num_generations, **options)
    assert_rows(run(batch, normalization="returns", **options), expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=200)
@given(
    batches(missing=False, gains=st.integers(0, 16).map(lambda n: n / 64)),
    st.lists(st.integers(0, 16).map(lambda n: n / 64), min_size=12, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.8, 1.0]),
)
def test_critic_equals_oracle(batch, first_belief, is_scored, info_gain_weight, gae_lambda):
    outcomes = [r if ok else NAN for r, ok in zip(batch.outcomes, is_scored, strict=False)]
    batch = Batch(batch.num_generations, batch.gains, outcomes)
    beliefs = [
        [b + sum(row[:k]) for k in range(len(row) + 1)] for b, row in zip(first_belief, batch.gains, strict=False)
    ]
    if all(math.isnan(r) for r in outcomes):
        expected = [[0.0] * len(row) for row in beliefs]
    else:
        arguments = (beliefs, outcomes, batch.num_generations, info_gain_weight, gae_lambda)
        expected = oracles.critic_advantages(*arguments, scale=False)
    width = max(len(row) for row in beliefs)
    options = {
        "normalization": "critic",
        "info_gain_weight": info_gain_weight,
        "gae_lambda": gae_lambda,
        "beliefs": torch.tensor([row + [NAN] * (width - len(row)) for row in beliefs], dtype=torch.float64),
    }
    assert_rows(run(batch, scale=False, **options), expected, atol=1e-7, rtol=1e-7)

    root_mean_square = math.sqrt(
        sum(a * a for row in expected for a in row)
        / max(1, sum(len(row) for row, r in zip(expected, outcomes, strict=True) if not math.isnan(r)))
    )
    scaled = [[a / max(root_mean_square, 1e-2) for a in row] for row in expected]
    assert_rows(run(batch, **options), scaled, atol=1e-6, rtol=1e-6)


def test_critic_by_hand():
    """
    Two rollouts of one question, one turn each, R = (1, 0), no gains, equal beliefs: each fit sees one other row.

    Measured from the first return, y = (0, -1). For rollout 0 the one-hot has the penalty 4 and the intercept c none,
    so c = -1 fits y_1 exactly and V_0 = -1, that is 0 as a return; nothing is left for the level. V_1 is 1.
    """
    batch = Batch(2, [[], []], [1.0, 0.0])
    expected = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for options in ({"scale": False}, {"std_floor": 0.0}):
        actual = run(batch, normalization="critic", info_gain_weight=0.0, **options)
        torch.testing.assert_close(actual[:, 0], expected, atol=1e-12, rtol=0.0)


@settings(deadline=None, max_examples=100)
@given(batches(missing=False), st.floats(-5, 5), st.sampled_from([0.5, 0.8, 1.0]), st.integers(0, 2**32 - 1))
def test_critic_of_equal_outcomes_is_exactly_zero(batch, outcome, gae_lambda, seed):
    batch = Batch(batch.num_generations, batch.gains, [outcome] * len(batch.outcomes))
    width = max(len(row) for row in batch.gains) + 1
    beliefs = torch.rand(len(batch.gains), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actual = run(batch, normalization="critic", info_gain_weight=0.0, gae_lambda=gae_lambda, beliefs=beliefs)
    assert (actual == 0).all()


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0]))
def test_critic_of_a_rollout_does_not_read_its_own_outcome(num_generations, num_groups, seed, info_gain_weight):
    """Unscaled with λ = 1, A_k = G_k - V_k: another outcome moves it by exactly as much, so V has stayed the same."""
    generator = torch.Generator().manual_seed(seed)
    num_rollouts = num_generations * num_groups
    turns = torch.randint(1, 6, (num_rollouts,), generator=generator)
    gain = torch.rand(num_rollouts, 6, generator=generator, dtype=torch.float64)
    outcome = torch.randint(0, 2, (num_rollouts,), generator=generator).double()
    beliefs = torch.rand(num_rollouts, 6, generator=generator, dtype=torch.float64)
    options = {"normalization": "critic", "scale": "none", "gae_lambda": 1.0, "beliefs": beliefs}
    options["info_gain_weight"] = info_gain_weight
    before = turn_advantages(gain, outcome, turns, num_generations, **options)
    i = int(torch.randint(num_rollouts, (), generator=generator))
    outcome[i] += 3.0
    after = turn_advantages(gain, outcome, turns, num_generations, **options)
    moved = (after - before)[i, : turns[i]]
    torch.testing.assert_close(moved, torch.full_like(moved, 3.0), atol=1e-9, rtol=0.0)


def test_critic_keeps_the_outcome_of_small_groups():
    """8 groups of 2, half right, nothing in the belief: GRPO gives ±1, and so does the critic."""
    batch = Batch(2, [[]] * 16, [1.0, 0.0] * 8)
    actual = run(batch, normalization="critic", info_gain_weight=0.0)[:, 0]
    torch.testing.assert_close(actual, torch.tensor([1.0, -1.0] * 8, dtype=torch.float64), atol=1e-6, rtol=0.0)


def test_critic_charges_turns_that_one_rollout_alone_reaches():
    """A rollout of six turns fails among rollouts of two that succeed half of the time: all its turns are to blame."""
    gains = [[0.0] * 5] + [[0.0]] * 7
    batch = Batch(4, gains, [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    actual = run(batch, normalization="critic", info_gain_weight=0.0, gae_lambda=1.0)[0]
    assert (actual < -0.5).all() and (actual[2:].max() - actual[2:].min()) < 1e-9


@pytest.mark.parametrize("num_groups", [1, 2, 16])
def test_critic_points_the_way_of_the_outcome(num_groups):
    """Groups of 8, uninformative beliefs and λ = 1: at most 2 % of turns have another sign than GRPO's."""
    generator = torch.Generator().manual_seed(0)
    wrong, total = 0, 0
    for _ in range(200):
        num_rollouts = 8 * num_groups
        turns = torch.randint(1, 5, (num_rollouts,), generator=generator)
        difficulty = torch.rand(num_groups, generator=generator).repeat_interleave(8)
        outcome = (torch.rand(num_rollouts, generator=generator) < difficulty).double()
        options = {"normalization": "critic", "info_gain_weight": 0.0, "gae_lambda": 1.0}
        zeros = torch.zeros(num_rollouts, 4, dtype=torch.float64)
        actual = turn_advantages(zeros, outcome, turns, 8, beliefs=zeros, **options)
        grpo = (outcome - outcome.view(-1, 8).mean(dim=1).repeat_interleave(8))[:, None]
        counts = (torch.arange(4) < turns[:, None]) & (grpo != 0)
        wrong += int(((actual * grpo < 0) & counts).sum())
        total += int(counts.sum())
    assert wrong <= 0.02 * total, wrong / total


def test_critic_beliefs_default_to_the_running_sum_of_gains():
    batch = Batch(2, [[0.2, 0.1], [0.4], [], [0.1, -0.1]], [1.0, 0.0, -2.0, 1.0])
    sums = torch.tensor([[0.0, 0.2, 0.3], [0.0, 0.4, 9.0], [0.0, 9.0, 9.0], [0.0, 0.1, 0.0]], dtype=torch.float64)
    expected = run(batch, normalization="critic", beliefs=sums)
    torch.testing.assert_close(run(batch, normalization="critic"), expected, atol=1e-12, rtol=0.0)


@settings(deadline=None, max_examples=100)
@given(batches(missing=False), st.floats(-5, 5), st.sampled_from([0.0, 0.5]))
def test_returns_of_equal_outcomes_are_exactly_zero(batch, outcome, outcome_weight):
    batch = Batch(batch.num_generations, batch.gains, [outcome] * len(batch.outcomes))
    options = {"normalization": "returns", "info_gain_weight": 0.0, "outcome_weight": outcome_weight}
    assert (run(batch, **options) == 0).all()


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_separate_by_hand():
    """
    Gains (0.3, 0.1 | 0.2): mean 0.2, variance (0.01 + 0.01 + 0) / 3, std 0.0816497, z = (1.2247, -1.2247 | 0).
    Outcomes (1, 0): mean 0.5, std 0.5, z = (1 | -1). With γ = 0.5, from the last turn backwards:
    rollout 0: 1; -1.2247 + 0.5 = -0.7247; 1.2247 + 0.5 · -0.7247 = 0.8624. Rollout 1: -1; 0 - 0.5 = -0.5.
    """
    actual = run(Batch(2, [[0.3, 0.1], [0.2]], [1.0, 0.0]), normalization="separate", gamma=0.5)
    assert_rows(actual, [[0.8624, -0.7247, 1.0], [-0.5, -1.0]], atol=1e-4, rtol=0.0)


def test_joint_by_hand():
    """Pool (0, 0.5 | 1, 0.5): mean 0.5, std sqrt(0.125) = 0.353553, z = (-1.4142, 0 | 1.4142, 0)."""
    actual = run(Batch(2, [[0.0], [1.0]], [0.5, 0.5]), normalization="joint")
    assert_rows(actual, [[-(2**0.5), 0.0], [2**0.5, 0.0]], atol=1e-9, rtol=0.0)


def test_per_turn_by_hand():
    """Turn 0 pool (0.1, 0.3): z = (-1, 1). Turn 1 pool (0.9): one value, 0. Outcomes equal: 0."""
    actual = run(Batch(2, [[0.1, 0.9], [0.3]], [1.0, 1.0]), normalization="per_turn")
    assert_rows(actual, [[-1.0, 0.0, 0.0], [1.0, 0.0]], atol=1e-9, rtol=0.0)


def test_returns_by_hand():
    """
    Gains (.3, .1 | .2), outcomes (1, 0 | a third rollout of one turn: .5). Returns: 1.4, 1.1, 1; .2, 0; .5.
    Turn 0: 1.4 - (.2 + .5)/2 = 1.05; .2 - (1.4 + .5)/2 = -.75; .5 - (1.4 + .2)/2 = -.3. Turn 1: 1.1 - 0; 0 - 1.1.
    Turn 2 has nobody else, so the others' outcomes: 1 - (0 + .5)/2 = .75.
    """
    actual = run(Batch(3, [[0.3, 0.1], [0.2], []], [1.0, 0.0, 0.5]), normalization="returns", scale="none")
    assert_rows(actual, [[1.05, 1.1, 0.75], [-0.75, -1.1], [-0.3]], atol=1e-12, rtol=0.0)


def test_batch_scale_by_hand():
    """Group means 0.5 and 3; std of (0, 1, 2, 4) = sqrt(35/16) = 1.479."""
    actual = run(Batch(2, [[], [], [], []], [0.0, 1.0, 2.0, 4.0]), scale="batch")
    std = (35 / 16) ** 0.5
    assert_rows(actual, [[-0.5 / std], [0.5 / std], [-1 / std], [1 / std]], atol=1e-9, rtol=0.0)


# --- identities ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(batches(missing=False, max_gains=0, min_size=2), st.sampled_from(NORMALISING))
def test_single_turn_is_grpo_up_to_a_factor_of_the_group_size(batch, normalization):
    actual = run(batch, normalization=normalization, std_floor=0.0)
    size = batch.num_generations
    grouped = torch.tensor(batch.outcomes, dtype=torch.float64).view(-1, size)
    grpo = (grouped - grouped.mean(1, keepdim=True)) / grouped.std(1, keepdim=True).clamp(min=1e-300)
    factor = (size / (size - 1)) ** 0.5  # population std is smaller than the sample std
    torch.testing.assert_close(actual[:, 0], factor * grpo.flatten(), atol=1e-9, rtol=1e-9)
    unscaled = run(batch, normalization=normalization, scale=False)
    torch.testing.assert_close(unscaled[:, 0], (grouped - grouped.mean(1, keepdim=True)).flatten())


@settings(deadline=None)
@given(st.lists(grid, min_size=2, max_size=6), st.sampled_from(NORMALISING))
def test_gains_telescope(beliefs, normalization):
    # γ = 1, no division by a std: the first turn's advantage of the gains is b_S - b_0, less the mean of each turn.
    # A second rollout with the negated gains makes every pool's mean 0.
    gains = [after - before for before, after in zip(beliefs, beliefs[1:], strict=False)]
    batch = Batch(2, [gains, [-gain for gain in gains]], [0.0, 0.0])
    actual = run(batch, normalization=normalization, scale=False, gamma=1.0)
    assert actual[0, 0].item() == pytest.approx(beliefs[-1] - beliefs[0], abs=1e-12)
    for k in range(len(gains)):
        assert actual[0, k].item() == pytest.approx(beliefs[-1] - beliefs[k], abs=1e-12)


@settings(deadline=None)
@given(batches(max_groups=2), st.sampled_from(NORMALIZATIONS), st.randoms(use_true_random=False))
def test_permutation_within_a_group(batch, normalization, random):
    order = []
    for first in range(0, len(batch.outcomes), batch.num_generations):
        members = list(range(first, first + batch.num_generations))
        random.shuffle(members)
        order += members
    options = {"normalization": normalization, "gamma": 0.9}
    expected = run(batch, **options)[order]
    torch.testing.assert_close(run(batch.rows(order), **options), expected, atol=1e-8, rtol=1e-8)


@settings(deadline=None)
@given(batches(max_groups=2), st.sampled_from(NORMALIZATIONS), st.sampled_from([0.0, 7.0, NAN, float("inf")]))
def test_padding_is_not_read(batch, normalization, garbage):
    expected = run(batch, normalization=normalization)
    width = expected.shape[1]
    actual = run(batch, normalization=normalization, extra_turns=2, garbage=garbage)
    tolerance = {"atol": 1e-8, "rtol": 1e-8} if normalization == "critic" else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(actual[:, :width], expected, **tolerance)
    assert (actual[:, width:] == 0).all()


@settings(deadline=None)
@given(batches(max_groups=1, max_size=3), batches(max_groups=2, max_size=3), st.sampled_from(NORMALISING))
def test_more_groups_change_nothing(batch, others, normalization):
    size = batch.num_generations
    more = len(others.outcomes) // size * size
    joined = Batch(size, batch.gains + others.gains[:more], batch.outcomes + others.outcomes[:more])
    actual = run(joined, normalization=normalization)[:size]
    expected = run(batch, normalization=normalization)
    width = expected.shape[1]
    torch.testing.assert_close(actual[:, :width], expected, atol=1e-12, rtol=1e-12)
    assert (actual[:, width:] == 0).all()


@settings(deadline=None)
@given(batches(missing=False), st.sampled_from(NORMALISING), st.integers(-3, 3))
def test_shifting_the_outcomes_changes_nothing_where_they_have_their_own_pool(batch, normalization, shift):
    if normalization == "joint":
        return
    shifted = Batch(batch.num_generations, batch.gains, [r + shift for r in batch.outcomes])
    options = {"normalization": normalization}
    torch.testing.assert_close(run(shifted, **options), run(batch, **options), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_is_zero_without_information(normalization):
    batch = Batch(3, [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]], [0.1] * 3)
    actual = run(batch, normalization=normalization)
    assert actual.isfinite().all()
    if normalization != "critic":
        assert (actual.abs() < 1e-12).all()
    if normalization in NORMALISING:
        assert (actual == 0).all()  # 0.1 is no dyadic number: its rounded mean must not leave a residue


@pytest.mark.parametrize("normalization", NORMALISING)
def test_group_of_one_is_zero_where_every_pool_has_one_value(normalization):
    assert (run(Batch(1, [[], [0.25]], [1.0, -2.0]), normalization=normalization)[0] == 0).all()
    one = run(Batch(1, [[0.25]], [1.0]), normalization=normalization)
    # Gain and outcome are one pool of two values in `joint`, two pools of one value otherwise.
    assert one.tolist() == ([[0.0, 1.0]] if normalization == "joint" else [[0.0, 0.0]])


# --- the mistakes of METHOD ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALISING)
def test_mistake_6_weights_apply_after_normalisation(normalization):
    batch = Batch(2, [[0.3, 0.1], [0.2, 0.6]], [1.0, 0.0])
    gains = run(batch, normalization=normalization, info_gain_weight=1.0, outcome_weight=0.0)
    outcomes = run(batch, normalization=normalization, info_gain_weight=0.0, outcome_weight=1.0)
    assert gains.abs().max() > 0.5
    assert outcomes.abs().max() > 0.5
    mixed = run(batch, normalization=normalization, info_gain_weight=0.3, outcome_weight=2.0)
    torch.testing.assert_close(mixed, 0.3 * gains + 2.0 * outcomes, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("normalization", NORMALISING)
def test_mistake_7_a_gain_of_zero_does_not_merge_turns(normalization):
    # Mean of the gains is 0, so the middle turn's normalised gain is exactly 0 as well.
    batch = Batch(2, [[0.5, 0.0, -0.5], [-0.5, 0.0, 0.5]], [0.0, 0.0])
    actual = run(batch, normalization=normalization, gamma=0.5)
    expected = oracles.turn_advantages(batch.gains, batch.outcomes, 2, normalization, gamma=0.5)
    assert_rows(actual, expected, atol=1e-12, rtol=0.0)
    assert actual[0, 1] == 0.5 * actual[0, 2] != 0  # discounted once from its neighbour, not shared with it


@pytest.mark.parametrize("normalization", NORMALISING)
def test_mistake_9_a_nan_gain_is_left_out_alone(normalization):
    batch = Batch(2, [[0.3, NAN, 0.1], [0.2, 0.4, 0.6]], [1.0, 0.0])
    actual = run(batch, normalization=normalization)
    assert actual.isfinite().all()
    assert actual[0, 1] == actual[0, 2]  # no reward of its own: what follows it
    assert actual[0, 0] != actual[0, 1]  # its neighbours keep theirs


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nan_outcome_excludes_the_rollout_from_every_pool(normalization):
    rest = Batch(2, [[0.3], [0.1, 0.2]], [1.0, 0.0])
    with_third = Batch(3, [[9.0, 9.0], *rest.gains], [NAN, *rest.outcomes])
    actual, expected = run(with_third, normalization=normalization), run(rest, normalization=normalization)
    assert (actual[0] == 0).all()
    torch.testing.assert_close(actual[1:], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_all_outcomes_missing(normalization):
    assert (run(Batch(2, [[0.3], [0.1]], [NAN, NAN]), normalization=normalization) == 0).all()


def test_mistake_12_the_outcome_pool_has_no_zeros_of_the_other_turns():
    # Same outcomes, same turn counts but more searches in one rollout: the outcome's z-scores are the same.
    short = run(Batch(2, [[], []], [1.0, 0.0]))
    long = run(Batch(2, [[0.0] * 5, []], [1.0, 0.0]))
    assert short[:, 0].tolist() == [1.0, -1.0]
    assert long[0].tolist() == [1.0] * 6
    assert long[1, 0] == -1.0


def test_mistake_15_equal_outcomes_still_learn_from_gains():
    actual = run(Batch(2, [[0.5], [0.1]], [0.0, 0.0]))
    assert actual[0, 0].item() == pytest.approx(1.0)
    assert actual[1, 0].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_noise_is_not_blown_up(normalization):
    generator = torch.Generator().manual_seed(0)
    gains = 1e-4 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    batch = Batch(8, gains.tolist(), [0.0] * 8)
    actual = run(batch, normalization=normalization, info_gain_weight=1.0)
    assert actual.abs().max() < 0.1
    loud = run(batch, normalization=normalization, info_gain_weight=1.0, std_floor=0.0)
    assert loud.abs().max() > 0.5  # what the floor is for


# --- form ------------------------------------------------------------------------------------------------------------


def test_turn_tax_of_joint():
    # Rollouts that differ only in their number of worthless searches: `joint` makes each search cost something.
    batch = Batch(2, [[0.0, 0.0, 0.0], [0.0]], [1.0, 1.0])
    # Pool (0, 0, 0, 1 | 0, 1): mean 1/3. Each further search costs 1/3 in units of the std.
    actual = run(batch, normalization="joint", scale=False)
    assert actual[0, 0].item() == pytest.approx(2 / 3 - 3 / 3)
    assert actual[1, 0].item() == pytest.approx(2 / 3 - 1 / 3)
    assert (run(batch, normalization="separate") == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_that_of_the_gains(dtype):
    gains, outcome, num_turns = Batch(2, [[0.5], [0.25]], [1.0, 0.0]).tensors()
    actual = turn_advantages(gains.to(dtype), outcome.float(), num_turns, 2)
    assert actual.dtype == dtype
    assert actual.tolist() == [[2.0, 1.0], [-2.0, -1.0]]


def test_inputs_are_not_changed():
    gains, outcome, num_turns = Batch(2, [[0.5, NAN], [0.25]], [1.0, NAN]).tensors()
    copies = gains.clone(), outcome.clone(), num_turns.clone()
    for normalization in NORMALIZATIONS:
        turn_advantages(gains, outcome, num_turns, 2, normalization=normalization, beliefs=gains)
    for tensor, copy in zip((gains, outcome, num_turns), copies, strict=True):
        torch.testing.assert_close(tensor, copy, equal_nan=True, atol=0.0, rtol=0.0)


def test_scale_names():
    batch = Batch(2, [[0.5], [0.25]], [1.0, 0.0])
    assert torch.equal(run(batch, scale=True), run(batch, scale="group"))
    assert torch.equal(run(batch, scale=False), run(batch, scale="none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info_gain": torch.zeros(4)}, r"got \(4,\), \(4,\) and \(4,\)"),
        ({"outcome": torch.zeros(3)}, r"got \(4, 2\), \(3,\) and \(4,\)"),
        ({"num_turns": torch.ones(4, 1).long()}, r"got \(4, 2\), \(4,\) and \(4, 1\)"),
        ({"beliefs": torch.zeros(4, 3)}, r"got \(4, 3\) and \(4, 2\)"),
        ({"num_generations": 3}, "got 4 rollouts in groups of 3"),
        ({"num_generations": 0}, "in groups of 0"),
        ({"num_turns": torch.tensor([1, 2, 3, 1])}, "between 1 and K = 2, got values from 1 to 3"),
        ({"num_turns": torch.tensor([0, 2, 1, 1])}, "got values from 0 to 2"),
        ({"normalization": "global"}, "joint, separate, per_turn, returns, critic, got 'global'"),
        ({"scale": "std"}, "got 'std'"),
    ],
)
def test_errors_name_what_was_given(change, message):
    arguments = {
        "info_gain": torch.zeros(4, 2),
        "outcome": torch.zeros(4),
        "num_turns": torch.ones(4).long(),
        "num_generations": 2,
    }
    with pytest.raises(ValueError, match=message):
        turn_advantages(**(arguments | change))


def test_no_loop_over_rollouts():
    # As many tensor operations for 2 rollouts as for 400 (a loop would need more); how long they take is measured in
    # benchmarks.
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for rollouts in (2, 400):
        arguments = torch.rand(rollouts, 5), torch.rand(rollouts), torch.randint(1, 6, (rollouts,)), 2
        for normalization in NORMALIZATIONS:
            with Count() as counter:
                turn_advantages(*arguments, normalization=normalization)
            counts.append((normalization, counter.calls))
    assert counts[: len(NORMALIZATIONS)] == counts[len(NORMALIZATIONS) :]
