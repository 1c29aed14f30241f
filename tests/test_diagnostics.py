"""What a batch says about the method."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from igpo_trl.training.diagnostics import Watch, make_watches, rank_correlation

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
