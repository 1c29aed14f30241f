"""What a batch says about the method."""

import logging

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.rollout.round_log import RoundLog
from igpo_trl.training.diagnostics import FirstCalls, Watch, make_watches, rank_correlation

vectors = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n)] * 2)
)


@given(vectors)
def test_rank_correlation_is_that_of_scipy(pair):
    a, b = pair
    actual = rank_correlation(torch.tensor([*a, torch.nan, 1.0]), torch.tensor([*b, 0.5, torch.nan]))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert actual is None
    else:
        assert actual == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def test_a_warning_after_many_batches_and_only_once(caplog):
    watch = Watch(lambda value: value <= 0, "%d batches, now %.2f", patience=3)
    with caplog.at_level(logging.WARNING):
        for value in (-0.1, 0.0, 0.2, -0.1, None, 0.0):
            watch.update(value)
        assert not caplog.records
        for _ in range(5):
            watch.update(-0.2)
    (record,) = caplog.records
    assert record.message == "3 batches, now -0.20"


@pytest.mark.parametrize(
    ("name", "bad", "good", "says"),
    [("belief/outcome_corr", 0.0, 0.1, "answer_template"), ("credit/turn_price", -0.3, 0.1, "-0.30 in units")],
)
def test_what_a_run_is_warned_by(caplog, name, bad, good, says):
    with caplog.at_level(logging.WARNING):
        for value in (good, bad):
            watch = make_watches()[name]
            for _ in range(20):
                watch.update(value)
    (record,) = caplog.records
    assert says in record.message and "20 batches" in record.message


@pytest.mark.parametrize(
    ("batches", "warned_after"),
    [
        ([(8, 0, 0), (8, 3, 3), (8, 0, 0)], 2),
        ([(64, 0, 0), (64, 0, 0)], 1),
        ([(8, 0, 0), (8, 4, 3), (64, 0, 0)], None),  # one call can be read
        ([(8, 0, 0), (7, 0, 0)], None),  # not yet 16
        ([(0, 0, 0)] * 20, None),  # no tools
    ],
)
def test_a_model_that_does_not_call_is_noticed_in_its_first_rollouts(caplog, batches, warned_after):
    """Rollouts, calls, and calls that could not be read, of each batch."""
    watch, warnings = FirstCalls(), []
    for rollouts, calls, malformed in batches:
        log = RoundLog(global_num_rollouts=rollouts, global_num_calls=calls, global_num_malformed=malformed)
        watch.update(log)
        warnings.append(len(caplog.records))
    assert warnings == [int(warned_after is not None and i >= warned_after) for i in range(1, len(batches) + 1)]
    if warned_after == 2:
        assert "None of the first 16 rollouts" in caplog.text and "(3 calls could not be read)" in caplog.text
        assert "igpo warm-start" in caplog.text


class Scripted(tiny.Scripted, IGPOTrainer):
    pass


@pytest.mark.parametrize(("first", "warns"), [("I do not know.", True), (tiny.call("Paris"), False)])
def test_a_run_is_warned_of_a_model_that_does_not_call(tmp_path, caplog, first, warns):
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, per_device_train_batch_size=16, num_generations=4)
    trainer.scripts = [["<tool_call>{", "No."], *[["I do not know."]] * 14, [first, "No."]]
    trainer.train()
    assert trainer.state.global_step == 1
    assert ("None of the first 16 rollouts contains a tool call" in caplog.text) == warns
