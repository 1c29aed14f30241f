import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igpo_trl.turns import expand_to_tokens, gain_spans, information_gain, turn_spans

masks = st.lists(st.lists(st.integers(0, 1), max_size=14), min_size=1, max_size=5)


def padded(rollouts, padding_value=0, extra=0):
    width = max(len(rollout) for rollout in rollouts) + extra
    mask = [rollout + [padding_value] * (width - len(rollout)) for rollout in rollouts]
    return torch.tensor(mask).view(len(rollouts), width), torch.tensor([len(rollout) for rollout in rollouts])


def test_two_turns_by_hand():
    #            position:  0  1  2  3  4  5  6  7
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0]])  # two turns, an observation between, one token of padding
    index, starts, num_turns = turn_spans(mask, torch.tensor([7]))
    assert index.tolist() == [[0, 0, -1, -1, -1, 1, 1, -1]]
    assert starts.tolist() == [[0, 5]]
    assert num_turns.tolist() == [2]


def test_trailing_observation_has_an_empty_turn_behind_it():
    index, starts, num_turns = turn_spans(torch.tensor([[1, 0, 0]]), torch.tensor([3]))
    assert index.tolist() == [[0, -1, -1]]
    assert starts.tolist() == [[0, 3]]  # turn 1 would have begun at position 3, the end
    assert num_turns.tolist() == [2]


def test_rollout_without_tokens_is_one_empty_turn():
    index, starts, num_turns = turn_spans(torch.zeros(1, 3, dtype=torch.long), torch.tensor([0]))
    assert index.tolist() == [[-1, -1, -1]]
    assert starts.tolist() == [[0]]
    assert num_turns.tolist() == [1]


def test_parallel_calls_share_one_observation():
    # Two tool results behind one turn are one run of zeros, hence one boundary.
    _, starts, num_turns = turn_spans(torch.tensor([[1, 1, 0, 0, 0, 0, 1]]), torch.tensor([7]))
    assert (starts.tolist(), num_turns.tolist()) == ([[0, 6]], [2])


def test_mistake_8_length_is_not_the_count_of_ones():
    # Five tokens of which three are sampled: the last turn sits at position 4, not at position 3 - 1.
    index, starts, _ = turn_spans(torch.tensor([[1, 0, 0, 1, 1]]), torch.tensor([5]))
    assert index[0, 4] == 1
    assert starts.tolist() == [[0, 3]]


@given(masks)
def test_equals_oracle(rollouts):
    index, starts, num_turns = turn_spans(*padded(rollouts))
    assert index.dtype == starts.dtype == num_turns.dtype == torch.long
    assert starts.shape == (len(rollouts), num_turns.max())
    for i, rollout in enumerate(rollouts):
        expected_index, expected_starts = oracles.turn_spans(rollout)
        assert index[i, : len(rollout)].tolist() == expected_index
        assert starts[i, : num_turns[i]].tolist() == expected_starts
        assert (index[i, len(rollout) :] == -1).all()
        assert (starts[i, num_turns[i] :] == len(rollout)).all()


@given(masks, st.integers(0, 3))
def test_padding_is_not_read(rollouts, extra):
    # Whatever stands behind the rollout, ones included, changes nothing.
    index, starts, num_turns = turn_spans(*padded(rollouts))
    wide_index, wide_starts, wide_num_turns = turn_spans(*padded(rollouts, padding_value=1, extra=extra))
    assert torch.equal(wide_index[:, : index.shape[1]], index)
    assert (wide_index[:, index.shape[1] :] == -1).all()
    assert torch.equal(wide_starts, starts)
    assert torch.equal(wide_num_turns, num_turns)


@given(masks)
def test_turns_partition_the_sampled_tokens(rollouts):
    mask, lengths = padded(rollouts)
    index, starts, num_turns = turn_spans(mask, lengths)
    ones = torch.arange(1.0, 1.0 + num_turns.max()).expand(len(rollouts), -1)
    values = expand_to_tokens(ones, index)
    assert torch.equal(values > 0, mask.bool())  # every sampled token has a turn, no other token has
    for i in range(len(rollouts)):
        for k in range(num_turns[i]):
            tokens = (index[i] == k).nonzero()[:, 0]
            if len(tokens):
                assert tokens[0] == starts[i, k]
                assert tokens[-1] - tokens[0] + 1 == len(tokens)  # contiguous


def test_does_not_change_its_input():
    mask, lengths = torch.tensor([[1, 0, 1, 1]]), torch.tensor([3])
    turn_spans(mask, lengths)
    assert mask.tolist() == [[1, 0, 1, 1]]
    assert lengths.tolist() == [3]


def test_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(3,\)"):
        turn_spans(torch.ones(2, 5), torch.tensor([5, 5, 5]))
    with pytest.raises(ValueError, match=r"\(5,\) and \(1,\)"):
        turn_spans(torch.ones(5), torch.tensor([5]))


def test_expand_to_tokens_by_hand():
    values = torch.tensor([[0.5, -2.0], [3.0, 7.0]])
    index = torch.tensor([[0, 0, -1, 1], [0, -1, -1, -1]])
    assert expand_to_tokens(values, index).tolist() == [[0.5, 0.5, 0.0, -2.0], [3.0, 0.0, 0.0, 0.0]]
    assert expand_to_tokens(values.double(), index).dtype == torch.float64


def test_expand_to_tokens_of_a_nan_turn_stays_in_its_turn():
    values = torch.tensor([[float("nan"), 1.0]])
    tokens = expand_to_tokens(values, torch.tensor([[-1, 1, 1, -1]]))
    assert tokens.tolist() == [[0.0, 1.0, 1.0, 0.0]]


# Information gain

log_beliefs = st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=6), min_size=1, max_size=5)


def ragged(rollouts):
    width = max(map(len, rollouts))
    return torch.tensor([row + [float("nan")] * (width - len(row)) for row in rollouts], dtype=torch.float64)


@given(log_beliefs, st.sampled_from(["prob_diff", "log_prob_diff", "log_gap"]), st.none() | st.integers(1, 4))
def test_gains_are_those_of_the_oracle(rollouts, kind, every):
    spans = None if every is None else [gain_spans(len(row), every=every) for row in rollouts]
    gains = information_gain(ragged(rollouts), kind, spans=spans)
    expected = ragged(oracles.information_gain(rollouts, kind, spans))
    torch.testing.assert_close(gains, expected, equal_nan=True, rtol=1e-9, atol=1e-12)


def test_gains_by_hand():
    """Beliefs .1, .4, .3 and .5, then nothing: gains .3 and -.1, and none at all."""
    beliefs = torch.tensor([[0.1, 0.4, 0.3], [0.5, torch.nan, torch.nan]])
    gains = information_gain(beliefs.log())
    torch.testing.assert_close(gains[0, :2], torch.tensor([0.3, -0.1]))
    assert gains.isnan().tolist() == [[False, False, True], [True, True, True]]
    log_gains = information_gain(beliefs.log(), "log_prob_diff")
    torch.testing.assert_close(log_gains[0, :2], torch.tensor([4.0, 0.75]).log())
    gaps = 0.1 - beliefs.log()
    gap_gains = information_gain(beliefs.log(), "log_gap")
    torch.testing.assert_close(gap_gains[0, :2], (gaps[0, :-1] / gaps[0, 1:]).log())
    assert information_gain(beliefs.log(), "log_prob_diff", clip=1.0)[0, :2].tolist() == [1.0, log_gains[0, 1].item()]


def test_the_gap_of_a_model_that_knows_nothing():
    """A hundredfold rise counts from 1e-6 as from 1e-3, and certainty is bounded."""
    low, high = (information_gain(torch.tensor([p]).log(), "log_gap")[0, 0] for p in ([1e-6, 1e-4], [1e-3, 1e-1]))
    assert 0.3 < low < high < 1.2
    sure = information_gain(torch.tensor([[1e-6, 1.0]]).log(), "log_gap")
    assert sure[0, 0] == pytest.approx(torch.tensor((0.1 + 13.8155) / 0.1).log().item(), abs=1e-4)


@given(log_beliefs)
def test_gains_in_probability_telescope(rollouts):
    gains = information_gain(ragged(rollouts)).nan_to_num(0.0).sum(dim=1)
    ends = torch.tensor([[row[0], row[-1]] for row in rollouts], dtype=torch.float64).exp()
    torch.testing.assert_close(gains, ends[:, 1] - ends[:, 0], rtol=0, atol=1e-12)


def test_a_belief_that_was_not_scored_gives_no_gain():
    gains = information_gain(torch.tensor([[-1.0, torch.nan, -0.5, -0.2]]))
    assert gains.isnan().tolist() == [[True, True, False, True]]
    assert information_gain(torch.zeros(0, 3)).shape == (0, 3)
    assert information_gain(torch.zeros(2, 3), spans=[[], []]).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), r"\(B, K\).*\(3,\)"),
        ((torch.zeros(2, 3), "ratio"), "prob_diff, log_prob_diff, log_gap, got 'ratio'"),
    ],
)
def test_bad_arguments_of_the_gain(arguments, message):
    with pytest.raises(ValueError, match=message):
        information_gain(*arguments)
    with pytest.raises(ValueError, match="1 lists"):
        information_gain(torch.zeros(2, 3), spans=[[]])
