"""
Training and evaluation with the real vLLM, on a CPU: `make test-vllm`.

Everything is float32, so that what vLLM says of a token and a plain forward of the trainer's model differ by rounding
only. Tensor parallelism, NCCL, sleep mode and several nodes need GPUs, and are not run.
"""

import math
import sys
import time
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from real_vllm.processes import HERE, LENGTH, answers, environment, popen, stop
from safetensors.torch import load_file

from igpo_trl.checkpoints import find_checkpoints, find_damage
from igpo_trl.evaluation import load_run
from igpo_trl.trajectory import StopReason, read_jsonl

ROUNDING, MOVED = 1e-4, 1e-2

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm installs it"),
]


def check(measured, num_steps=3):
    """What holds of every run: log-probabilities, weights, correction, beliefs."""
    for rank in measured:
        assert len(rank["steps"]) == num_steps
        for i, step in enumerate(rank["steps"]):
            assert step["sampled"] > 0
            assert step["log_probs"] < ROUNDING, i
            assert step["beliefs"] < 1e-5, i
            # A server or an engine with the weights of the step before would be seen.
            assert i == 0 or step["moved"] > MOVED, i
            assert len(step["advantages"]) == 2 and step["advantages"][0] == len(step["turns"])
        assert any(step["advantages_differ"] for step in rank["steps"])  # between turns of one rollout
        for log in rank["logs"]:
            assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
            for name in ("min", "mean", "max"):
                assert log[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1, abs=1e-2)
            assert log["sampling/sampling_logp_difference/max"] < ROUNDING
    turns = Counter(turns for rank in measured for step in rank["steps"] for turns in step["turns"])
    assert max(turns) > 1, turns  # tools were called


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_colocate(train, lora):
    options = {"lora": True, "learning_rate": 1e-2} if lora else {}
    measured = train(
        "colocate_lora" if lora else "colocate_full", vllm_mode="colocate", vllm_max_model_length=LENGTH, **options
    )
    check(measured)
    assert all(step["weights"] < 1e-6 for step in measured[0]["steps"])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_server(train, server, lora):
    options = {"lora": True, "learning_rate": 1e-2} if lora else {}
    name = "server_lora" if lora else "server_full"
    measured = train(name, vllm_mode="server", vllm_server_base_url=server.url, **options)
    check(measured)
    check_context(measured)


def check_context(measured):
    """Nothing is longer than the server's context, which is shorter than the model's, and its end has a name."""
    stops = Counter()
    for rank in measured:
        assert rank["max_model_len"] == LENGTH
        for step in rank["steps"]:
            assert max(step["tokens"]) <= LENGTH
            stops.update(step["stops"])
    assert stops[StopReason.CONTEXT_LIMIT] > 0, stops
    return stops


def test_two_processes_with_one_server(train, server):
    measured = train(
        "server_two_processes", 2, vllm_mode="server", vllm_server_base_url=server.url, temperature=1.2, max_steps=4
    )
    assert [rank["processes"] for rank in measured] == [2, 2]
    check(measured, num_steps=4)
    rounds = [
        (a, b)
        for first, second in zip(measured[0]["steps"], measured[1]["steps"], strict=True)
        for a, b in zip(first["live"], second["live"], strict=True)
    ]
    assert any(a != b and a and b for a, b in rounds), rounds  # live rollouts differ, which is what TRL cannot deal


def command_line(files, run, *more):
    return [
        "--config", "configs/hotpotqa_cpu.yaml", "--questions", files / "questions.jsonl", "--index", files / "index",
        "--model_name_or_path", files / "model", "--output_dir", run, "--search_max_words", 12, "--num_eval_questions", 0,
        "--max_steps", 6, "--save_steps", 1, "--per_device_train_batch_size", 4, "--num_generations", 4,
        "--max_completion_length", 400, "--learning_rate", 1e-3, "--disable_tqdm", "true", *more,
    ]  # fmt: skip


def test_a_server_that_dies_ends_training_with_one_line_and_a_new_one_resumes_it(
    run, start_server, folder, repository, tmp_path
):
    server, output = start_server(), tmp_path / "run"
    options = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url]
    words = [HERE / "cpu.py", "server", "train", *command_line(folder, output, *options)]
    environ = environment(repository)
    with (tmp_path / "log").open("w") as log:
        process = popen([sys.executable, *map(str, words)], environ, stdout=log, cwd=repository)
        try:
            deadline = time.monotonic() + 300
            while len(find_checkpoints(output)) < 2:
                text = (tmp_path / "log").read_text()
                assert process.poll() is None and time.monotonic() < deadline, text[-6000:]
                time.sleep(0.02)
            stop(server.process)
            assert not answers(f"{server.url}/health")
            assert process.wait(timeout=200) == 1
        finally:
            stop(process)
    text = (tmp_path / "log").read_text()
    last = next(each for each in find_checkpoints(output) if find_damage(each) is None)
    assert text.strip().splitlines()[-1] == (
        f"Error: the vLLM server at {server.url} does not answer any more. Start it again and resume with "
        f"`resume_from_checkpoint`; the last checkpoint is {last}."
    )
    assert "Traceback" not in text
    assert int(last.name[11:]) < 6

    start_server(server.port)
    result = run(*words, "--resume_from_checkpoint", "true")
    assert result.returncode == 0, result.stdout[-6000:]
    assert find_checkpoints(output)[0].name == "checkpoint-6"
    records = list(read_jsonl(output / "trajectories/rank0.jsonl"))
    assert Counter(record.step for record in records) == dict.fromkeys(range(6), 4)
    first, last = (load_file(path / "model.safetensors") for path in (folder / "model", output))
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_evaluation(run, folder, tmp_path):
    words = [
        "eval", "--model", folder / "model", "--data", folder / "questions.jsonl", "--index", folder / "index",
        "--out", tmp_path / "run", "--max-turns", 3, "--max-completion-length", 300, "--max-words", 12,
        "--system-prompt", "Search, then answer inside <answer> and </answer>.",
    ]  # fmt: skip
    result = run(HERE / "cpu.py", "colocate", *words, "--vllm", "--dtype", "float32")
    assert result.returncode == 0, result.stdout[-6000:]
    records = load_run(tmp_path / "run")
    print(result.stdout[-3000:], records[0] if records else None)
    assert (tmp_path / "run/results.json").is_file()
