"""Two processes compute the numbers of one process."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from distributed import script

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("script.py")
ROUNDING = 1e-7  # of weights below 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def ranks(launch, folder):
    """What each of two processes got; one of their runs resumes at a checkpoint of one process."""
    script.end_of_run(folder / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch([*launcher, str(SCRIPT), str(folder)], ACCELERATE_USE_CPU="true")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def single(folder):
    """What one process, this one, gets."""
    return script.run(folder, 1)


@pytest.fixture(scope="module")
def runs(single, ranks):
    return single["cases"], [rank["cases"] for rank in ranks]


def test_advantages_are_those_of_one_process(runs):
    single, ranks = runs
    for one, *parts in zip(single, *ranks, strict=True):
        assert one["ids"] == [ids for part in parts for ids in part["ids"]], one["case"]
        advantages = [row for part in parts for row in part["advantages"]]
        assert any(row.abs().max() > 0.3 for row in advantages)
        for row, expected in zip(advantages, one["advantages"], strict=True):
            torch.testing.assert_close(row, expected, atol=1e-6, rtol=0.0, msg=str(one["case"]))


def test_metrics_are_those_of_the_whole_batch(runs):
    single, (first, _) = runs
    for one, two in zip(single, first, strict=True):
        for name, value in one["logs"][0].items():
            if name.startswith(("info_gain", "belief", "collapse", "rollout", "advantages", "reward")):
                assert two["logs"][0][name] == pytest.approx(value, abs=1e-5), (name, one["case"])


def test_one_process_prints_the_lines_of_both(runs):
    single, (first, second) = runs
    for one, two, other in zip(single, first, second, strict=True):
        lines = [line for line in two["console"] if line.startswith("step ")]
        steps = [log for log in one["logs"] if "reward" in log]
        assert len(lines) == len(steps) > 0 and other["console"] == [], two["console"]
        for name in ("reward", "searches", "belief", "collapse", "answered"):
            assert all(name in line for line in lines), lines


def test_both_processes_end_with_the_parameters_of_one(runs):
    single, ranks = runs
    for one, first, second in zip(single, *ranks, strict=True):
        for name, value in one["parameters"].items():
            assert torch.equal(first["parameters"][name], second["parameters"][name])
            # Rotary embeddings are float32 in float64 models, too.
            torch.testing.assert_close(first["parameters"][name], value, atol=1e-8, rtol=0.0)


def test_mistake_17_both_processes_make_the_same_number_of_forwards(runs):
    single, (first, second) = runs
    assert [one["forwards"] for one in first] == [one["forwards"] for one in second]
    # The second process has no rollout with a gain to score (but the critic's), and runs along all the same.
    assert all(one["forwards"] > 0 for one in second)


def test_padding_changes_rounding_only(single, ranks):
    start = {name: value.detach() for name, value in tiny.make_model("qwen3").named_parameters()}
    for one, *parts in zip(single["padding"], *(rank["padding"] for rank in ranks), strict=True):
        expected = one[0]["parameters"]  # with TRL's padding, in one process
        for padded, real in (one, *parts):
            assert padded["ids"] == real["ids"]
            for name, value in expected.items():
                moved = (value - start[name]).abs().max().item()
                for run in (padded, real):
                    difference = (run["parameters"][name] - value).abs().max().item()
                    assert difference < 1e-4 * moved + ROUNDING, (name, difference, moved)
            for logs, other in zip(padded["logs"][:2], real["logs"][:2], strict=True):
                assert other["perf/padding"] <= 1 < logs["perf/padding"]
                for name in ("loss", "grad_norm", "entropy"):
                    assert other[name] == pytest.approx(logs[name], rel=1e-5, abs=1e-7), name


def test_repeated_questions_do_not_count_in_evaluation(single, ranks):
    """Metrics of an evaluation by one process, and by the first of two."""
    one, two = single["evaluation"], ranks[0]["evaluation"]
    assert one["eval_f1"] == two["eval_f1"] == pytest.approx(3 / 5)
    assert one["eval_rollout/turns/mean"] == pytest.approx(8 / 5)
    for name in one:
        if name.startswith(("eval_rollout", "eval_reward", "eval_belief", "eval_info_gain")) and "second" not in name:
            if not name.endswith("std"):  # of each batch
                assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_both_processes_stop_when_a_tool_fails_on_one(ranks):
    first, second = (rank["stopped"] for rank in ranks)
    assert "'search' does not work: 6 of 11 calls failed" in first
    assert "it is gone" in first and second == first


def test_rollouts_of_one_vllm_server_keep_their_own_turns(ranks, folder):
    """Two processes with different live rollouts sample from one server, and ask for no more than it allows."""
    processes = [json.loads((folder / f"vllm{rank}.json").read_text()) for rank in range(2)]
    for process in processes:
        assert process["longest"] <= 720
        rows = zip(*(process[name] for name in ("numbers", "texts", "logprobs", "roles", "stops")), strict=True)
        for number, text, logprobs, roles, stop in rows:
            assert stop == "answered"
            assert roles == ["assistant", "tool"] * number + ["assistant"]
            assert text.count(f'"query": "author {number}"') == number
            assert text.endswith(f"<answer>author {number}</answer><|im_end|>")
            assert logprobs == [-float(number)]
    requests = processes[0]["requests"]
    assert requests[0][:2] == [4, 2]  # 4 questions, sampled twice
    # Rounds of 6, 4 and 2 live rollouts: rank 0 has 2, 2, 2 and rank 1 has 4, 2, 0. Filled up, both have 4, 2, 2.
    sizes = [size for size, n, _ in requests[1:] if n == 1]
    assert 8 in sizes and 4 in sizes


def test_a_run_that_resumes_where_rollouts_are_left_over_ends_with_the_same_weights(ranks, folder):
    for rank, result in enumerate(ranks):
        whole, resumed = result["whole"]["weights"], result["resumed"]["weights"]
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
        state = torch.load(folder / f"whole/checkpoint-1/igpo_state_{rank}.pt", weights_only=True)
        assert state["step"] == 1 and len(state["rollouts"]) == 1


def test_a_checkpoint_of_fewer_processes_is_resumed_by_more(ranks, folder):
    """The first process has rollouts left over, and the second one has nothing."""
    assert torch.load(folder / "one/checkpoint-1/igpo_state_0.pt", weights_only=True)["rollouts"]
    first, second = (result["of one process"] for result in ranks)
    assert all(torch.equal(second["weights"][name], value) for name, value in first["weights"].items())
    assert first["step"] == second["step"] == 3


def test_a_checkpoint_of_more_processes_is_resumed_by_fewer(ranks, folder, caplog):
    """Half of the rollouts that were left are of no use."""
    end = script.end_of_run(folder / "fewer", folder / "whole/checkpoint-1")
    assert end["step"] == 3
    assert "checkpoint-1: `num_processes` was 2 and is 1. Training resumes, but not exactly" in caplog.text
