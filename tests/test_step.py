"""One generation batch: turns, beliefs, gains, advantages, metrics and records; and the numbers of a recorded step."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.records import completion_columns, trajectories_of
from igpo_trl.rollout.tool_calls import malformed_call
from igpo_trl.rollout.turn_reader import TurnReader
from igpo_trl.step import Step
from igpo_trl.trajectory import read_jsonl

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("step.json").read_text())


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = (
        [tiny.call("Paris"), tiny.call("Rome"), tiny.call("Paris"), tiny.answer("Paris")],
        [tiny.call("Rome"), tiny.answer("Rome")],
        [tiny.answer("Paris")],
        [tiny.call("Paris"), '<tool_call>{"name": "search", "arg', "I do not know."],
    )


MALFORMED = (  # what the policy was told when the numbers were recorded
    "the tool call could not be read (json parser could not parse region as JSON. Content: "
    '\'{"name": "search", "arg<|im_end|>\' Error: Unterminated string starting at: line 1 column 20 (char 19)). '
    "Repeat it in the right form."
)


@pytest.mark.parametrize("normalization", GOLDEN)
def test_a_recorded_step_comes_out_the_same(tmp_path, monkeypatch, normalization):
    """
    Recorded with torch 2.13.0, transformers 5.23.0 and trl 1.16.0 before the step was taken apart into `Step`,
    `RolloutLoop` and `BeliefScorer`: every later version must give these numbers. `critic` was recorded
    again when its value came to be fitted without the rollout itself, and when it took the square of the belief,
    λ = 0.9 and a gain weight of 1.
    """
    monkeypatch.setattr(TurnReader, "_malformed", lambda *_: malformed_call(MALFORMED, "search"))
    torch.manual_seed(0)
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        normalization=normalization,
        save_trajectories=True,
        num_generations=4 if normalization in ("joint", "critic") else 2,
        gamma=0.9,
        info_gain="log_prob_diff" if normalization == "per_turn" else "prob_diff",
        num_iterations=2 if normalization == "critic" else 1,
        seed=3,
        max_steps=3,
    )
    trainer.train()
    golden, log = GOLDEN[normalization], trainer.state.log_history[0]
    assert {name: log[name] for name in golden["metrics"]} == pytest.approx(golden["metrics"], rel=1e-4, abs=1e-6)
    assert (log["loss"], log["grad_norm"]) == pytest.approx((golden["loss"], golden["grad_norm"]), rel=1e-3)
    records = [record for record in read_jsonl(tmp_path / "trajectories" / "rank0.jsonl") if record.step == 0]
    assert len(records) == len(golden["rollouts"]) == 4
    for record, expected in zip(records, golden["rollouts"], strict=True):
        assert record.stop_reason == expected["stop_reason"] and record.group == expected["group"]
        assert record.outcome == pytest.approx(expected["outcome"])
        assert len(record.turns) == len(expected["turns"])
        for turn, (num_tokens, belief, info_gain, advantage) in zip(record.turns, expected["turns"], strict=True):
            assert turn.num_tokens == num_tokens
            assert turn.belief == (belief and pytest.approx(belief, rel=1e-4))
            assert turn.info_gain == (info_gain and pytest.approx(info_gain, rel=1e-3, abs=1e-7))
            assert turn.advantage == pytest.approx(advantage, rel=1e-3, abs=1e-4)


# Two rollouts. The first: turn of two tokens, observation of three, turn of one. The second: a turn of one token,
# then an observation that left no room, which makes a last, empty turn.
PROMPTS = [[5, 6], [7]]
COMPLETIONS = [[10, 11, 20, 21, 22, 12], [13, 23]]
MASKS = [[1, 1, 0, 0, 0, 1], [1, 0]]


def make_step(**fields):
    step = Step([{"answers": ["Paris"]}, {"answers": "Rome"}], training=True, num_generations=2, **fields)
    step.set_rollouts(PROMPTS, COMPLETIONS, MASKS)
    return step


def test_turns_and_the_contexts_before_them():
    step = make_step()
    assert step.turn_starts == [[0, 5], [0, 2]] and step.num_turns.tolist() == [2, 2]
    assert step.scored_turns == [[0, 1], [0, 1]] and step.boundaries == [[2, 7], [1, 3]]
    assert step.sequences[1] == [7, 13, 23]
    assert step.answers == [("Paris",), ("Rome",)]


def test_without_a_mask_everything_was_sampled():
    step = Step([{}, {}], training=True)
    step.set_rollouts(PROMPTS, COMPLETIONS, None)
    assert step.turn_starts == [[0], [0]] and (step.turn_index >= 0).sum() == 8


def test_only_the_turns_that_a_gain_needs_are_scored():
    step = make_step(scores_every_turn=False, info_gain_tools=["search"])
    assert step.scored_turns == [[], []]  # no turn called it
    step.round_log.tools_called = [[("search",), ()], [("calculator",), ()]]
    assert step.scored_turns == [[0, 1], []] and step.boundaries == [[2, 7], []]
    step.set_beliefs([torch.tensor([0.1, 0.5]).log(), torch.zeros(0)])
    torch.testing.assert_close(step.gains, torch.tensor([[0.4, torch.nan], [torch.nan] * 2]), equal_nan=True)
    torch.testing.assert_close(step.beliefs, torch.tensor([[0.1, 0.5], [torch.nan] * 2]), equal_nan=True)


def test_from_beliefs_to_the_advantages_of_tokens():
    """Gains .4 and .2: z = ±1. Outcomes 0 and 1: z = ∓1. With γ = .5: (1 - .5, -1) and (-1 + .5, 1)."""
    step = make_step()
    step.set_beliefs([torch.tensor([0.1, 0.5]).log(), torch.tensor([0.1, 0.3]).log()])
    step.set_rewards(torch.tensor([[0.0, 5.0], [1.0, torch.nan]]), torch.tensor([1.0, 0.0]))
    step.gather(Accelerator(cpu=True))
    step.set_advantages(normalization="separate", gamma=0.5)
    torch.testing.assert_close(step.global_advantages, torch.tensor([[0.5, -1.0], [-0.5, 1.0]]), atol=1e-5, rtol=0)
    tokens = step.token_advantages(torch.zeros(2, 8))  # TRL may pad to a multiple
    assert tokens.shape == (2, 8)
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0, -1, 0, 0], [-0.5, 0, 0, 0, 0, 0, 0, 0]])  # an empty turn has no token
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    metrics = step.metrics(lambda values: values, torch.device("cpu"))
    assert metrics["rollout/turns/mean"] == 2.0
    assert metrics["collapse/outcome"] == metrics["collapse/advantage"] == 0.0
    assert "f1" not in metrics  # of evaluation
    columns = completion_columns(step)
    assert columns["belief"] == ["+0.100 +0.500", "+0.100 +0.300"] and columns["info_gain"] == ["+0.400", "+0.200"]
    records = trajectories_of(step, tiny.make_tokenizer(), ["a", "b"])
    assert [record.rewards for record in records] == [{"a": 0.0, "b": 5.0}, {"a": 1.0, "b": None}]
    assert [len(turn.text) > 0 for turn in records[1].turns] == [True, False]
    assert records[0].turns[1].info_gain is None and records[0].turns[0].info_gain == pytest.approx(0.4)


def test_a_rollout_without_a_reward_has_no_outcome():
    step = make_step()
    step.set_rewards(torch.tensor([[torch.nan, torch.nan], [1.0, 2.0]]), torch.tensor([1.0, 0.5]))
    assert step.global_outcome.isnan().tolist() == [True, False] and step.global_outcome[1] == 2.0
    assert trajectories_of(step, tiny.make_tokenizer(), ["a", "b"])[0].outcome is None


def test_the_step_of_a_padded_batch_is_the_same():
    output = {
        "prompt_ids": torch.tensor([[5, 6], [0, 7]]),
        "prompt_mask": torch.tensor([[1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[10, 11, 20, 21, 22, 12], [13, 23, 0, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 1, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1]]),  # TRL pads it with ones
    }
    step, expected = Step.from_output([{}, {}], output, training=False), make_step()
    assert step.prompt_ids == expected.prompt_ids and step.completion_ids == expected.completion_ids
    assert torch.equal(step.turn_index, expected.turn_index) and step.turn_starts == expected.turn_starts
    assert [record.group for record in trajectories_of(step, tiny.make_tokenizer())] == [0, 0]  # none in evaluation


def test_a_truncated_rollout_keeps_its_turns(tmp_path):
    """`mask_truncated_completions` leaves it out of the loss; what was sampled is still recorded and has gains."""
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        mask_truncated_completions=True,
        save_trajectories=True,
        max_completion_length=120,
    )
    tokenizer = tiny.make_tokenizer()
    trainer.scripts = [
        [tiny.call("Paris"), tokenizer.encode("word " * 200)[:400]],
        [tiny.call("Rome"), tiny.answer("Rome")],
    ]
    trainer.train()
    records = list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))
    assert [len(record.turns) for record in records] == [2, 2, 2, 2]
    assert all(record.turns[0].info_gain is not None for record in records)
