"""
Training and evaluation with the real vLLM, on a CPU: `make test-vllm`.

Everything is float32, so that what vLLM says of a token and a plain forward of the trainer's model differ by rounding
only. Tensor parallelism, NCCL, sleep mode and several nodes need GPUs, and are not run.
"""

import json
import math
import sys
import time
from collections import Counter

import pytest
import torch
from real_vllm.processes import HERE, LENGTH, VERSION, answers, environment, free_port, popen, stop, table
from safetensors.torch import load_file

from igpo_trl.checkpoints import find_checkpoints, find_damage
from igpo_trl.evaluation import load_run
from igpo_trl.sandbox.tiny_model import SYSTEM_PROMPT
from igpo_trl.trajectory import StopReason, read_jsonl

ROUNDING, MOVED = 1e-4, 1e-2

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(VERSION is None, reason="vLLM for a CPU is not installed: make test-vllm"),
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
        assert any(log["grad_norm"] > 0 for log in rank["logs"])
        for log in rank["logs"]:
            assert math.isfinite(log["loss"])
            for name in ("min", "mean", "max"):
                assert log[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1, abs=1e-2)
            assert log["sampling/sampling_logp_difference/max"] < ROUNDING
    steps = [step for rank in measured for step in rank["steps"]]
    assert max(turns for step in steps for turns in step["turns"]) > 1  # tools were called
    assert any(step["advantages_differ"] for step in steps)  # between turns of one rollout
    assert any(step["scored"] for step in steps)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_colocate(train, lora):
    options = {"lora": True, "learning_rate": 2e-3} if lora else {}
    name = f"colocate, {'LoRA' if lora else 'full'}"
    measured = train(name, vllm_mode="colocate", vllm_max_model_length=LENGTH, **options)
    check(measured)
    assert all(step["weights"] < 1e-6 for step in measured[0]["steps"])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_server(train, server, lora):
    options = {"lora": True, "learning_rate": 2e-3} if lora else {}
    name = f"server, {'LoRA' if lora else 'full'}"
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
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url, "temperature": 0.9}
    # The second process cuts calls off, which ends these rollouts; see `script.py`.
    measured = train("server, two processes", 2, on_malformed_tool_call="end", **options)
    assert [rank["processes"] for rank in measured] == [2, 2]
    check(measured)
    assert any(numbers_differ(*steps) for steps in zip(*(rank["steps"] for rank in measured), strict=True))


def numbers_differ(first, second):
    """Whether the first process has more live rollouts in the second turn than the second one, which has some."""
    return first["live"][1:2] > second["live"][1:2] > [0]


def test_a_server_refuses_turns_that_its_context_has_no_room_for(run, server, folder):
    """What happens if the length of the context is taken from the model."""
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url, "asks_server": False, "name": "refused"}
    options["vllm_group_port"] = free_port()
    result = run(HERE / "script.py", folder, json.dumps(options))
    assert result.returncode == 1
    refused = [line for line in result.stdout.splitlines() if "Request failed: 400" in line]
    assert refused and "(parameter=max_tokens, value=400)" in refused[-1]


def command_line(files, run, *more):
    return [
        "--config", "configs/hotpotqa_cpu.yaml", "--questions", files / "questions.jsonl", "--index", files / "index",
        "--model_name_or_path", files / "model", "--output_dir", run, "--search_max_words", 12,
        "--num_eval_questions", 0, "--max_steps", 6, "--save_steps", 1, "--per_device_train_batch_size", 4,
        "--num_generations", 4,
        "--max_completion_length", 400, "--learning_rate", 1e-3, "--disable_tqdm", "true", *more,
    ]  # fmt: skip


def test_a_server_that_dies_ends_training_with_one_line_and_another_one_resumes_it(
    run, start_server, server, folder, repository, tmp_path
):
    another, server, output = server, start_server(), tmp_path / "run"
    options = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_group_port", free_port()]
    words = [HERE / "cpu.py", "server", "train", *command_line(folder, output, *options)]
    words += ["--vllm_server_base_url", server.url]
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
            died = time.monotonic()
            assert process.wait(timeout=200) == 1
            waited = time.monotonic() - died  # TRL's client tries again
        finally:
            stop(process)
    text = (tmp_path / "log").read_text()
    last = next(each for each in find_checkpoints(output) if find_damage(each) is None)
    assert [line for line in text.splitlines() if line.startswith("Error")] == [
        f"Error: the vLLM server at {server.url} does not answer any more. Start it again and resume with "
        f"`resume_from_checkpoint`; the last checkpoint is {last}."
    ]
    assert f"To resume from {last}:\n  igpo train " in text
    assert "Traceback" not in text
    assert int(last.name[11:]) < 6

    result = run(*words[:-1], another.url, "--resume_from_checkpoint", "true")
    assert result.returncode == 0, result.stdout[-6000:]
    assert find_checkpoints(output)[0].name == "checkpoint-6"
    records = list(read_jsonl(output / "trajectories/rank0.jsonl"))
    assert Counter(record.step for record in records) == dict.fromkeys(range(6), 4)
    first, last = (load_file(path / "model.safetensors") for path in (folder / "model", output))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    table.append(("server that dies, until the error", *["–"] * 6, f"{waited:.0f} s"))


def test_evaluation_gives_the_rollouts_beliefs_and_scores_of_transformers(run, folder, tmp_path):
    given = {
        "model": folder / "model", "data": folder / "questions.jsonl", "index": folder / "index", "max-turns": 3,
        "max-completion-length": 300, "max-words": 12, "system-prompt": SYSTEM_PROMPT, "dtype": "float32",
    }  # fmt: skip
    words = ["eval", *(word for name, value in given.items() for word in (f"--{name}", value))]
    began = time.monotonic()
    with_vllm = run(HERE / "cpu.py", "colocate", *words, "--vllm", "--out", tmp_path / "vllm")
    seconds = time.monotonic() - began
    assert with_vllm.returncode == 0, with_vllm.stdout[-6000:]
    without = run("-m", "igpo_trl", *words, "--out", tmp_path / "transformers")
    assert without.returncode == 0, without.stdout[-6000:]
    first, second = (load_run(tmp_path / name) for name in ("vllm", "transformers"))
    assert len(first) == len(second) == 7
    largest = 0.0
    for one, two in zip(first, second, strict=True):
        assert [turn.text for turn in one.turns] == [turn.text for turn in two.turns]
        assert (one.info["f1"], one.stop_reason) == (two.info["f1"], two.stop_reason)
        largest = max(largest, *(abs(a - b) for a, b in zip(one.beliefs, two.beliefs, strict=True)))
    assert any(len(one.turns) > 1 for one in first)
    assert largest < 1e-5
    scores = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("vllm", "transformers")]
    assert scores[0].keys() == scores[1].keys()
    sampled = sum(turn.num_tokens for one in first for turn in one.turns)
    table.append(("igpo eval", str(sampled), "–", "–", "–", "–", f"{largest:.1e}", f"{seconds:.0f} s"))
