"""Training that is stopped and resumed ends as if it had not been: weights, order of questions, records, logs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.checkpoints import find_checkpoints, find_damage
from igpo_trl.training.console import MetricsFile
from igpo_trl.training.resume import STATE_FILE, CheckpointNotSaved
from igpo_trl.trajectory import read_jsonl

LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)}


class Trainer(IGPOTrainer):
    """Samples the first turn of odd rollouts as a random model does, and makes the others search first."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        said = [*self._tokenizer.encode(tiny.call("Paris"), add_special_tokens=False), self._tokenizer.eos_token_id]
        first = len(prompt_ids) == self.args.per_device_train_batch_size * self.args.steps_per_generation
        return [said if first and i % 2 == 0 else ids for i, ids in enumerate(completions)], logprobs


def reward(completion_ids, **kwargs) -> list[float]:
    """Differs from rollout to rollout."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def make_trainer(folder: Path, **options) -> IGPOTrainer:
    options = {
        "save_trajectories": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 5,
        "max_completion_length": 64,
        "generation_kwargs": {"max_new_tokens": 6},
        "train_dataset": tiny.make_dataset(5),  # two of the three epochs shuffle anew
        "reward_funcs": reward,
        "info_gain_weight_end": 0.5,
        "normalization": "separate",
        "warmup_steps": 2,
    } | options
    trainer = tiny.make_trainer(Trainer, IGPOConfig, folder, **options)
    trainer.add_callback(MetricsFile())
    return trainer


def end_of(trainer: IGPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def records(folder: Path) -> list[str]:
    kept = []
    for each in read_jsonl(folder / "trajectories/rank0.jsonl"):
        each.seconds = None
        kept.append(each.to_json())
    return kept


def logs(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("second", "time", "perf/", "latency", "train_loss")
    return [{key: x for key, x in line.items() if not any(word in key for word in timed)} for line in lines]


def after_kill(run: Path, step: int, folder: Path) -> Path:
    """The directory of a run that was killed some time after a checkpoint: what came later is there as well."""
    shutil.copytree(run, folder)
    for checkpoint in find_checkpoints(folder):
        if int(checkpoint.name[11:]) > step:
            (checkpoint / "trainer_state.json").unlink()
    return folder


CASES = {
    "lora, several batches between two logs": LORA | {"logging_steps": 2},
    "rollouts left by num_iterations": {"num_iterations": 3, "num_train_epochs": 2, "max_steps": 7},
    "rollouts left by steps_per_generation": {"steps_per_generation": 2, "per_device_train_batch_size": 2},
    "belief of a snapshot": {"belief_model": "snapshot", "belief_snapshot_steps": 3},
    "a reference that follows": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "model": "base"},
    "an adapter that is trained further": {"beta": 0.1, "num_iterations": 2, "model": "adapter"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The directories of a model and of an adapter of it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make_model("qwen3").save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_run_resumed_at_any_checkpoint_equals_one_that_was_not_stopped(tmp_path, models, options):
    if "model" in options:
        options = options | {"model": str(models / options["model"])}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    expected, num_steps = end_of(whole), whole.state.global_step
    assert any(log.get("grad_norm", 0) > 0 for log in whole.state.log_history)
    for step in range(1, num_steps, 2):
        folder = after_kill(tmp_path / "whole", step, tmp_path / f"from-{step}")
        resumed = make_trainer(folder, **options)
        resumed.train(resume_from_checkpoint=True)
        got = end_of(resumed)
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == [], step
        assert records(folder) == records(tmp_path / "whole")
        assert logs(folder) == logs(tmp_path / "whole")
        shutil.rmtree(folder)


def test_an_earlier_versions_checkpoint_resumes_and_says_that_this_is_not_exact(tmp_path, caplog):
    make_trainer(tmp_path, num_iterations=2, max_steps=3).train()
    (tmp_path / "checkpoint-3" / STATE_FILE.format(rank=0)).unlink()
    resumed = make_trainer(tmp_path, num_iterations=2, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3: some process has no igpo_state_RANK.pt" in caplog.text
    # The second half of an iteration is sampled again, and the next one begins where it would have.
    assert resumed.state.global_step == 4 and resumed._step == 4
    assert sorted({each.step for each in read_jsonl(tmp_path / "trajectories/rank0.jsonl")}) == [0, 2, 3]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True)
    except OSError:
        pytest.skip("there is no `mount`")
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def full_disk(folder: Path, file: str) -> None:
    """The next checkpoint has no room for a file: a device that is always full takes its place."""
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / file).symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "config.json", STATE_FILE.format(rank=0)])
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path, file):
    make_trainer(tmp_path, max_steps=1).train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}
    full_disk(tmp_path, file)
    expected = r"checkpoint-2 could not be saved \(.+\): [\d.]+ MB were free. .* after step 2.*Make room"
    with pytest.raises(CheckpointNotSaved, match=expected):
        make_trainer(tmp_path, max_steps=2, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert {path: path.read_bytes() for path in before} == before and find_damage(tmp_path / "checkpoint-1") is None


def test_a_disk_that_fills_up_with_checkpoints(small_disk):
    with pytest.raises(CheckpointNotSaved, match="checkpoint-2 could not be saved"):
        make_trainer(small_disk, max_steps=4, save_total_limit=1, save_trajectories=False).train()
    assert [path.name for path in find_checkpoints(small_disk)] == ["checkpoint-1"]
    assert find_damage(small_disk / "checkpoint-1") is None


KILLED = """
import os, signal, sys, torch
from pathlib import Path
import test_resume

saved = torch.save
def save(value, file, *args, **kwargs):
    saved(value, file, *args, **kwargs)
    if str(file).endswith(sys.argv[2]):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
test_resume.make_trainer(Path(sys.argv[1]), max_steps=4, save_steps=2, save_total_limit=1).train(
    resume_from_checkpoint=sys.argv[3] == "resume"
)
"""


def test_a_kill_while_a_checkpoint_is_overwritten_leaves_the_one_before(tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    folder = after_kill(tmp_path / "whole", 2, tmp_path / "killed")
    # As one that was left whole by a run that went another way: what is overwritten is not to be taken for it.
    shutil.copy(tmp_path / "whole/checkpoint-4/trainer_state.json", folder / "checkpoint-4")
    (folder / "checkpoint-4/model.safetensors").unlink()
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), "rng_state.pth", "resume"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert code.returncode == -signal.SIGKILL, code.stderr[-2000:]
    assert (folder / "checkpoint-4/model.safetensors").is_file()
    assert find_damage(folder / "checkpoint-4") == "trainer_state.json is missing"
    assert find_damage(folder / "checkpoint-2") is None
    resumed = make_trainer(folder, **options)
    resumed.train(resume_from_checkpoint=True)
    expected = end_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in end_of(resumed).items())
