"""Two processes compute the numbers of one process."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("script.py")


def results(launch, folder, num_processes):
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    launch([*command, str(SCRIPT), str(folder), str(num_processes)], ACCELERATE_USE_CPU="true")
    return [torch.load(folder / f"rank{rank}of{num_processes}.pt") for rank in range(num_processes)]


@pytest.fixture(scope="module")
def all_runs(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (single,) = results(launch, folder, 1)
    return single, results(launch, folder, 2)


@pytest.fixture(scope="module")
def runs(all_runs):
    single, ranks = all_runs
    return single[:-1], [rank[:-1] for rank in ranks]


@pytest.fixture(scope="module")
def evaluations(all_runs):
    """Metrics of an evaluation by one process, and by the first of two."""
    single, ranks = all_runs
    return single[-1]["evaluation"], ranks[0][-1]["evaluation"]


def test_advantages_are_those_of_one_process(runs):
    single, ranks = runs
    for one, *parts in zip(single, *ranks, strict=True):
        assert one["ids"] == [ids for part in parts for ids in part["ids"]], one["case"]
        advantages = [row for part in parts for row in part["advantages"]]
        assert any(row.abs().max() > 0.3 for row in advantages)
        for row, expected in zip(advantages, one["advantages"], strict=True):
            torch.testing.assert_close(row, expected, atol=2e-4, rtol=0.0, msg=str(one["case"]))


def test_metrics_are_those_of_the_whole_batch(runs):
    single, (first, _) = runs
    for one, two in zip(single, first, strict=True):
        for name in one["log"]:
            if name.startswith(("info_gain", "belief", "collapse", "rollout", "advantages", "reward")):
                assert two["log"][name] == pytest.approx(one["log"][name], abs=1e-5), (name, one["case"])


def test_both_processes_end_with_the_parameters_of_one(runs):
    single, ranks = runs
    for one, first, second in zip(single, *ranks, strict=True):
        for name, value in one["parameters"].items():
            assert torch.equal(first["parameters"][name], second["parameters"][name])
            torch.testing.assert_close(first["parameters"][name], value, atol=1e-5, rtol=1e-4)


def test_mistake_17_both_processes_make_the_same_number_of_forwards(runs):
    single, (first, second) = runs
    assert [one["forwards"] for one in first] == [one["forwards"] for one in second]
    # The second process has no rollout with a gain to score (but the critic's), and runs along all the same.
    assert all(one["forwards"] > 0 for one in second)


def test_repeated_questions_do_not_count_in_evaluation(evaluations):
    one, two = evaluations
    assert one["eval_f1"] == two["eval_f1"] == pytest.approx(3 / 5)
    assert one["eval_rollout/turns/mean"] == pytest.approx(8 / 5)
    for name in one:
        if name.startswith(("eval_rollout", "eval_reward", "eval_belief", "eval_info_gain")) and "second" not in name:
            if not name.endswith("std"):  # of each batch
                assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_both_processes_stop_when_a_tool_fails_on_one(runs):
    _, (first, second) = runs
    assert "'search' does not work: 6 of 11 calls failed" in first[0]["stopped"]
    assert "it is gone" in first[0]["stopped"] and second[0]["stopped"] == first[0]["stopped"]
