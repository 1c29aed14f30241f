"""
Mistakes that other implementations of information gain made, each with a number and a test that would catch it here.

Most tests stand beside the function that could make the mistake and carry the number in their name
(`test_mistake_<number>_…`); the ones that need the whole trainer are below.

 1. beliefs scored on stale tokens of an earlier, longer batch       10. trained tokens are re-tokenised, not sampled
 2. one malformed rollout ends every later one                       11. forced or injected tokens are trained on
 3. only the first alias counts                                      12. the outcome is z-scored with other turns' 0s
 4. tags and answers are looked for in the whole transcript          13. a missing log-prob counts as probability 1
 5. set-based F1 passed off as SQuAD F1                              14. KL or ratio on detached values
 6. reward weights applied before normalisation                      15. failed or equal-outcome rollouts are dropped
 7. turn ends recognised by a non-zero reward                        16. beliefs where nobody needs them
 8. the last position taken from the count of ones                   17. ranks differ in their number of forwards
 9. one NaN or role marker drops a rollout's gains
"""

import re
from pathlib import Path

import pytest
import tiny
import torch

import igpo_trl.beliefs.scorer
import igpo_trl.step
from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import score_beliefs
from igpo_trl.trajectory import read_jsonl

SEARCH, RIGHT, WRONG = tiny.call("Paris"), tiny.answer("Paris"), tiny.answer("Rome")


class Trainer(tiny.Scripted, IGPOTrainer):
    """Keeps its generation batches; `plays`, where given, are the scripts of each generation in turn."""

    plays = ()

    def _generate_and_score_completions(self, inputs):
        self.batches = getattr(self, "batches", [])
        if self.plays:
            self.scripts = self.plays[len(self.batches)]
        self.batches.append(super()._generate_and_score_completions(inputs))
        return self.batches[-1]


@pytest.fixture
def make(tmp_path):
    def make(name="run", **options):
        folder = tmp_path / name
        trainer = tiny.make_trainer(Trainer, IGPOConfig, folder, **{"save_trajectories": True} | options)
        trainer.records = lambda: list(read_jsonl(folder / "trajectories" / "rank0.jsonl"))
        return trainer

    return make


@pytest.fixture
def spy(monkeypatch):
    """Every call of the belief pass, as (sequences, boundaries, probes)."""
    calls = []

    def record(model, sequences, boundaries, probes, **options):
        calls.append((sequences, boundaries, probes))
        return score_beliefs(model, sequences, boundaries, probes, **options)

    monkeypatch.setattr(igpo_trl.beliefs.scorer, "score_beliefs", record)
    return calls


def sampled_ids(output, row):
    """Runs of tokens that are trained on."""
    trained = (output["completion_mask"][row] * output["tool_mask"][row]).tolist()
    runs = [[]]
    for token, mask in zip(output["completion_ids"][row].tolist(), trained, strict=True):
        if mask:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_every_mistake_has_a_test():
    named = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        named |= {int(number) for number in re.findall(r"def test_mistake_(\d+)_", path.read_text(encoding="utf-8"))}
    assert named == set(range(1, 18))


def test_mistake_1_an_earlier_longer_batch_leaves_nothing_behind(make):
    short = [[SEARCH, RIGHT], [SEARCH, WRONG]]
    long = [[tiny.call("Paris " * 20), SEARCH, SEARCH, RIGHT], [tiny.call("Rome " * 9), WRONG]]
    # A learning rate of 0: the same policy scores the same rollouts, behind a longer batch and first.
    options = {"per_device_train_batch_size": 2, "max_completion_length": 512, "learning_rate": 0.0}
    options |= {"train_dataset": tiny.make_dataset(1), "max_steps": 2}
    behind, first = make("behind", **options), make("first", **options)
    behind.plays, first.plays = (long, short), (short, long)
    behind.train()
    first.train()
    records = behind.records() + first.records()
    assert [len(record.turns) for record in records] == [4, 2, 2, 2, 2, 2, 4, 2]
    for one, other in zip(records[2:4], records[4:6], strict=True):
        assert one.beliefs == pytest.approx(other.beliefs, rel=1e-6)
    torch.testing.assert_close(behind.batches[1]["advantages"], first.batches[0]["advantages"])


def test_mistake_2_an_empty_thought_ends_no_other_rollout(make):
    trainer = make(num_generations=4)
    trainer.scripts = [["<think>\n\n</think>"], [SEARCH, RIGHT], [SEARCH, SEARCH, WRONG], ["<think></think>"]]
    trainer.train()
    records = trainer.records()
    assert [len(record.turns) for record in records] == [1, 2, 3, 1]
    assert [record.outcome for record in records] == [-2.0, 1.0, 0.0, -2.0]
    assert all(turn.info_gain is not None for record in records for turn in record.turns[:-1])


def test_mistake_10_trained_tokens_are_the_sampled_ones(make, spy):
    trainer = make(per_device_train_batch_size=2)
    tokenizer = trainer.processing_class
    # The same text letter by letter: decoding and encoding it again would give other ids.
    letters = [i for letter in RIGHT for i in tokenizer.encode(letter)] + [tokenizer.eos_token_id]
    assert letters[:-1] != tokenizer.encode(RIGHT)
    trainer.scripts = [[SEARCH, letters], [letters]]
    trainer.train()
    (output,) = trainer.batches
    search = [*tokenizer.encode(SEARCH), tokenizer.eos_token_id]
    assert sampled_ids(output, 0) == [search, letters]
    assert sampled_ids(output, 1) == [letters]
    ((sequences, _, _),) = spy
    prompt = output["prompt_ids"][0][output["prompt_mask"][0].bool()].tolist()
    length = int(output["completion_mask"][0].sum())
    assert sequences[0] == prompt + output["completion_ids"][0, :length].tolist()
    assert [record.outcome for record in trainer.records()] == [1.0, 1.0]


def test_mistake_11_injected_tokens_are_not_trained_on(make):
    from trl.chat_template_utils import qwen3_chat_template

    # With thinking off this template injects a closed thought before every turn.
    tokenizer = tiny.make_tokenizer(qwen3_chat_template)
    options = {"processing_class": tokenizer, "chat_template_kwargs": {"enable_thinking": False}}
    trainer = make(per_device_train_batch_size=2, **options)
    trainer.scripts = [[SEARCH, RIGHT], [SEARCH, SEARCH, WRONG]]
    trainer.train()
    (output,) = trainer.batches
    for row, script in enumerate(trainer.scripts):
        ids = output["completion_ids"][row]
        assert "<think>" in tokenizer.decode(ids)
        turns = [text + "<|im_end|>" for text in script]
        assert [tokenizer.decode(run) for run in sampled_ids(output, row)] == turns
        weighted = ids[output["advantages"][row] != 0]
        assert "<think>" not in tokenizer.decode(weighted)


def test_mistake_13_a_belief_that_was_not_scored_is_no_number(make):
    # Rollouts of one turn are not scored. As log-prob 0 they would have belief 1 and enter the means and the pool.
    trainer = make(num_generations=4, normalization="separate")
    trainer.scripts = [[SEARCH, RIGHT], [RIGHT], [WRONG], [WRONG]]
    trainer.train()
    records = trainer.records()
    assert [record.beliefs for record in records[1:]] == [[None]] * 3
    metrics = trainer.state.log_history[0]
    assert metrics["belief/prompt"] == pytest.approx(records[0].turns[0].belief)
    assert metrics["belief/final"] == pytest.approx(records[0].turns[1].belief)
    assert metrics["info_gain/std"] == 0.0  # one gain
    # A pool of one gain is worth 0: the search gets what follows it, no more.
    assert records[0].turns[0].advantage == records[0].turns[1].advantage


def test_mistake_16_each_context_is_scored_once(make, spy):
    trainer = make(max_steps=2, num_iterations=2, normalization="separate")  # one generation batch, used twice
    trainer.scripts = [[SEARCH, RIGHT], [SEARCH, SEARCH, SEARCH, WRONG], [RIGHT], ["?"]]
    trainer.train()
    ((_, boundaries, probes),) = spy
    assert [len(row) for row in boundaries] == [2, 4, 0, 0]  # nothing for rollouts that cannot have a gain
    assert all(len(set(row)) == len(row) for row in boundaries)
    # Probes are as long as the template and the answer, not padded.
    longest = max(len(probe.token_ids) for row in probes for probe in row)
    assert longest < 60


def test_mistake_15_malformed_rollouts_stay_in_their_group(make):
    trainer = make(num_generations=4)
    trainer.scripts = [["<answer>"], [RIGHT], [WRONG], [WRONG]]
    trainer.train()
    # (-2, 1, 0, 0): mean -0.25, std sqrt((3.0625 + 1.5625 + 0.0625 + 0.0625) / 4) = 1.089725.
    expected = [-1.75 / 1.089725, 1.25 / 1.089725, 0.25 / 1.089725, 0.25 / 1.089725]
    assert [record.turns[0].advantage for record in trainer.records()] == pytest.approx(expected, abs=1e-5)
