"""Rollouts that a user's function makes: `env_mask` says what the policy sampled, and only that can be an answer."""

import pytest
import tiny

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.trajectory import read_jsonl

RIGHT, WRONG = tiny.answer("Paris"), tiny.answer("Rome")
# What the policy says, what it is shown, and so on.
ROLLOUTS = {
    "a tool shows the answer": (["Search.", RIGHT, WRONG], 0.0),
    "the policy answers": (["Search.", WRONG, RIGHT], 1.0),
    "an answer in an earlier turn": ([RIGHT, "Nothing found.", "I do not know."], -2.0),
    "no turn after the last result": (["Search.", RIGHT], -2.0),
    "one turn": ([RIGHT], 1.0),
}


def roll_out(pieces, with_mask=True):
    """A `rollout_func` whose every rollout consists of these pieces."""

    def rollout_func(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [tokenizer.encode(piece + "<|im_end|>") for piece in pieces]
        mask = [token for i, piece in enumerate(ids) for token in [1 - i % 2] * len(piece)]
        completion = [token for piece in ids for token in piece]
        number = len(prompts)
        output = {
            "prompt_ids": [tokenizer.encode("Where?")] * number,
            "completion_ids": [completion] * number,
            "logprobs": [[0.0] * len(completion)] * number,
        }
        return output | ({"env_mask": [mask] * number} if with_mask else {})

    return rollout_func


def train(tmp_path, rollout_func, **options):
    options = {"tools": None, "save_trajectories": True, "rollout_func": rollout_func} | options
    trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, **options)
    trainer.train()
    return trainer, list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("kind", ["messages", "text"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_only_the_last_sampled_turn_can_answer(tmp_path, name, kind):
    pieces, reward = ROLLOUTS[name]
    dataset = tiny.make_dataset()
    if kind == "text":
        dataset = dataset.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    trainer, records = train(tmp_path, roll_out(pieces), train_dataset=dataset)
    assert trainer.state.log_history[0]["reward"] == reward
    answer = {1.0: "Paris", 0.0: "Rome"}.get(reward)
    assert set(trainer.current_step.predictions) == {answer}
    sampled = pieces[::2] + [""] * (len(pieces) == 2)  # an empty turn after the last result
    assert [turn.text.removesuffix("<|im_end|>") for turn in records[0].turns] == sampled


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_reward_functions_of_users_get_what_trl_gives_them(tmp_path):
    """The completions are whole transcripts, as in TRL; the last turn comes as a column."""
    seen = []

    def reward(completions, last_sampled_turn, **_):
        seen.append((completions[0], last_sampled_turn[0]))
        return [0.0] * len(completions)

    train(tmp_path, roll_out(["Search.", RIGHT, WRONG]), reward_funcs=reward)
    ((completion, last),) = seen
    assert completion == [{"role": "assistant", "content": f"Search.{RIGHT}{WRONG}"}] and last == WRONG


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_without_a_mask_the_completion_is_one_turn(tmp_path):
    trainer, _ = train(tmp_path, roll_out(["Search.", WRONG, RIGHT], with_mask=False))
    assert trainer.state.log_history[0]["reward"] == 1.0


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_a_mask_that_is_not_read_is_refused(tmp_path):
    """With tools TRL ignores it, and would train on the observations."""
    with pytest.raises(ValueError, match="`rollout_func` returned an `env_mask`.*Leave out `tools`"):
        train(tmp_path, roll_out(["Search.", RIGHT, WRONG]), tools=[tiny.search])
