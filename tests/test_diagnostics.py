"""What a batch says about the method."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from igpo_trl.training.diagnostics import CorrelationWatch, rank_correlation

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
    watch = CorrelationWatch(patience=3)
    with caplog.at_level(logging.WARNING):
        for correlation in (-0.1, 0.0, 0.2, -0.1, None, 0.0):
            watch.update(correlation)
        assert not caplog.records
        for _ in range(5):
            watch.update(-0.2)
    (record,) = caplog.records
    assert "answer_template" in record.message and "3 batches" in record.message
