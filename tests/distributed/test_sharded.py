"""
Every kind of parallelism: two processes whose rollouts need different numbers of rounds do what one process does.

One group of rollouts lies across both. With sharded parameters every forward is a collective, so a process that makes
one more than the others stops them all.
"""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from distributed import sharded
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("sharded.py")
CASES = {
    "ddp": ("uneven", "lora", "continued"),
    "zero2": ("uneven", "lora", "continued"),
    "fsdp2": ("even", "uneven", "lora", "continued", "old_log_probs", "accumulated"),
    "zero3": ("even", "uneven", "lora", "continued", "old_log_probs", "accumulated", "ungathered"),
}
TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install 'igpo-trl[deepspeed]'",
)
METHODS = [
    "ddp", "fsdp2", pytest.param("zero2", marks=NEEDS_DEEPSPEED), pytest.param("zero3", marks=NEEDS_DEEPSPEED)
]  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process, this one, gets: with TRL's padding, without checkpointing."""
    folder = tmp_path_factory.mktemp("single")
    return {case: sharded.run(folder / case, 1, **options) for case, options in sharded.CASES.items()}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(method, launch, single, tmp_path, repository):
    if method == "ddp":  # whose shipped configuration starts processes on GPUs only
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {"ACCELERATE_USE_CPU": "true"}
    else:
        # The shipped configuration, but for what needs GPUs: bfloat16, and eight of them.
        options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
        config = repository / "accelerate_configs" / f"{method}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
        environment = {"DS_ACCELERATOR": "cpu"}
    launch([*launcher, str(SCRIPT), str(tmp_path), *CASES[method]], **environment)
    for case in CASES[method]:
        one, ranks = single[case], [torch.load(tmp_path / f"{case}-rank{rank}.pt") for rank in range(2)]
        check_sharding(method, one, ranks)
        check_rounds(case, one, ranks)
        check_parameters(method, case, one, ranks)
        assert all(result["obstacle"] is None for result in (one, *ranks))
        # One process scores its rollouts when they end; sharded models wait for the old log-probabilities.
        has_old_log_probs = case in ("old_log_probs", "accumulated")
        assert [result["held"] > 0 for result in (one, *ranks)] == [False] + [has_old_log_probs] * 2
        check_saved(tmp_path / case / "saved", ranks[0])


def check_sharding(method, one, ranks):
    # A launcher that quietly starts one process, or shards nothing, would make every comparison pass.
    assert one["distributed_type"] == "NO" and one["num_processes"] == 1
    for i, rank in enumerate(ranks):
        assert rank["distributed_type"] == TYPES[method]
        assert rank["num_processes"] == 2 and rank["process_index"] == i
        assert rank["zero_stage"] == {"zero2": 2, "zero3": 3}.get(method)
        expected, elements = one["elements"], rank["elements"]
        shards_updates, shards_weights = method != "ddp", method in ("fsdp2", "zero3")
        assert elements["updated"] == expected["updated"] / (2 if shards_updates else 1)
        assert elements["shard"] == expected["shard"] / (2 if shards_weights else 1)
        if shards_weights:
            assert elements["whole"] < expected["shard"] / 50, "hardly a parameter is given up between two uses"


def check_rounds(case, one, ranks):
    assert len(one["records"]) == len(ranks[0]["records"]) == len(ranks[1]["records"])
    for expected, *parts in zip(one["records"], *(rank["records"] for rank in ranks), strict=True):
        first, second = (part["rounds"] for part in parts)
        assert len(first) == len(second) == len(expected["rounds"]), "the processes generate equally often"
        assert [a + b for a, b in zip(first, second, strict=True)] == expected["rounds"]
        assert case == "even" or 0 in first + second, "a process has to wait for the other"
        assert [row.tolist() for part in parts for row in part["completion_ids"]] == [
            row.tolist() for row in expected["completion_ids"]
        ]
        advantages = torch.cat([row for part in parts for row in part["advantages"]])
        tolerance = 1e-6 if is_exact(case) else 2e-4
        torch.testing.assert_close(advantages, torch.cat(expected["advantages"]), atol=tolerance, rtol=0.0)
        # What the policy gave to each sampled token: the context that it sampled from was the right one.
        sampled = [turn for part in parts for turns in part["log_probs"] for turn in turns]
        for turn, reference in zip(sampled, [turn for turns in expected["log_probs"] for turn in turns], strict=True):
            assert turn == pytest.approx(reference, abs=1e-4)


def is_exact(case):
    return sharded.CASES[case].get("dtype") == torch.float64


def check_parameters(method, case, one, ranks):
    pads = sharded.CASES[case]["pad_to_longest"]
    largest = max(value.abs().max().item() for value in one["end"].values())
    # In float64 what remains is that rotary embeddings are float32, and that positions are others without padding.
    # ZeRO keeps the weights that it updates in float32: each of the two steps rounds by half of the last bit.
    rounding = 2 * 2**-24 * 2 ** math.ceil(math.log2(largest)) if method.startswith("zero") else 0.0
    tolerance = rounding + (1e-12 if pads else 1e-8) if is_exact(case) else 2e-6
    copies = [name for name in one["start"] if ".ref." in name]
    assert (len(copies) > 0) == (case == "continued")
    assert all(torch.equal(result["end"][name], one["start"][name]) for name in copies for result in (one, *ranks))
    assert not copies or one["logs"][0]["kl"] < 1e-9 < 1e-6 < one["logs"][1]["kl"]
    for expected, log in zip(one["logs"], ranks[0]["logs"], strict=True):
        assert log.get("kl", 0.0) == pytest.approx(expected.get("kl", 0.0), rel=1e-4, abs=1e-9)
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert (log["perf/padding"] <= 1) != pads, "the forwards of the case are of the other kind"
    moved = 0.0
    for name, expected in one["end"].items():
        first, second = (rank["end"][name] for rank in ranks)
        assert torch.equal(first, second), name
        assert (first - expected).abs().max() <= tolerance, name
        moved = max(moved, (first - one["start"][name]).abs().max().item())
    assert moved > 2e-3  # a thousand times the largest tolerance


def check_saved(folder, rank):
    (file,) = folder.glob("*model.safetensors")
    saved = load_file(file)
    trained = {name.replace(".default.", "."): value for name, value in rank["end"].items()}
    assert saved.keys() <= trained.keys()
    assert saved.keys() == trained.keys() or all("lora_" in name for name in saved)
    for name, value in saved.items():
        assert torch.equal(value, trained[name]), name
