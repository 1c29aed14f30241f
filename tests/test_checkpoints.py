"""Which checkpoints are whole, where training resumes, and that two runs in one directory stay apart."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.checkpoints import find_checkpoints, find_damage, last_whole_checkpoint
from igpo_trl.trajectory import read_jsonl

SCRIPTS = [[tiny.call("Paris"), tiny.answer("Paris")], [tiny.answer("Rome")]]


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = SCRIPTS


def make_trainer(folder: Path, **options):
    options = {"save_trajectories": True, "save_steps": 1, "save_strategy": "steps", "max_steps": 2} | options
    trainer = tiny.make_trainer(Trainer, IGPOConfig, folder, **options)
    trainer.scripts = SCRIPTS
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory of a run of two steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder).train()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_what_the_trainer_saves_is_whole(run):
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-2", "checkpoint-1"]
    assert find_damage(run / "checkpoint-2") is None
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert last_whole_checkpoint(run / "checkpoint-2") is None
    assert "no such directory" in find_damage(run / "absent")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over(run, caplog, name, damage):
    file = run / "checkpoint-2" / name
    file.unlink() if damage == "missing" else cut(file, 0 if damage == "empty" else 0.7)
    assert name in find_damage(run / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(run) == str(run / "checkpoint-1")
    assert name in caplog.text and "Resuming from" in caplog.text


def test_only_weights_are_needed_where_only_they_are_saved(run):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-2" / name).unlink()
    assert find_damage(run / "checkpoint-2") is not None
    assert find_damage(run / "checkpoint-2", only_model=True) is None


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(run):
    for checkpoint in find_checkpoints(run):
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is not whole: model\.safetensors is missing; .*checkpoint-1"):
        last_whole_checkpoint(run)


def tensors(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"weight": torch.zeros(4)}, path)
    else:
        torch.save({"weight": torch.zeros(4)}, path)


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "model-00002-of-00002.safetensors"),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["ref/adapter_model.safetensors"], "ref/adapter_model.safetensors"),
        (["pytorch_model_fsdp.bin"], "pytorch_model_fsdp.bin"),
        (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"], "pytorch_model_fsdp_0/.metadata"),
        (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"], "pytorch_model_fsdp_0/__0_0.distcp"),
        (
            ["global_step7/mp_rank_00_model_states.pt", "global_step7/zero_mp_rank_00_optim_states.pt", "latest"],
            "latest",
        ),
        (
            ["global_step7/mp_rank_00_model_states.pt", "global_step7/zero_mp_rank_00_optim_states.pt", "latest"],
            "global_step7/zero_mp_rank_00_optim_states.pt",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_layouts_of_weights(run, files, needed):
    folder = run / "checkpoint-2"
    (folder / "model.safetensors").unlink()
    for name in files:
        if name.endswith((".safetensors", ".bin", ".pt")):
            tensors(folder / name)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("global_step7" if name == "latest" else "{}")
    if files[0].startswith("model-"):
        (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    assert find_damage(folder) is None
    if needed.endswith((".safetensors", ".bin", ".pt")):
        content = (folder / needed).read_bytes()
        cut(folder / needed)
        assert "is cut off" in find_damage(folder)
        (folder / needed).write_bytes(content)
        assert find_damage(folder) is None
    (folder / needed).unlink()
    assert find_damage(folder) is not None


def test_the_trainer_resumes_at_the_last_whole_checkpoint(run, caplog):
    trainer = make_trainer(run)
    (run / "checkpoint-2/model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 is not whole: model.safetensors is missing. Resuming from" in caplog.text
    assert trainer.state.global_step == 2
    assert [t.step for t in read_jsonl(run / "trajectories/rank0.jsonl")] == [0] * 4 + [1] * 4
    assert find_damage(run / "checkpoint-2") is None
    with pytest.raises(ValueError, match="is not a whole checkpoint: trainer_state.json"):
        (run / "checkpoint-1/trainer_state.json").unlink()
        make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-1"))


@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_finished_run_takes_no_further_steps_and_says_so(run, caplog, max_steps):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    # Five steps an epoch: the run stopped in the middle of one.
    trainer = make_trainer(run, max_steps=max_steps, train_dataset=tiny.make_dataset(10))
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert f"Nothing is left to train: the checkpoint is from step 2 of {max_steps}." in caplog.text
    assert trainer.state.global_step == 2
    assert len(list(read_jsonl(run / "trajectories/rank0.jsonl"))) == 8
    after = {path: path.stat().st_mtime_ns for path in run.rglob("checkpoint*/*")}
    assert after.items() <= before.items()
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())


def test_two_fresh_runs_in_one_directory_keep_their_records_apart(run, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(run).train()
    assert "trajectories-1" in caplog.text
    for name in ("trajectories", "trajectories-1"):
        assert [t.step for t in read_jsonl(run / name / "rank0.jsonl")] == [0] * 4 + [1] * 4
    make_trainer(run, max_steps=1).train()
    assert len(list(read_jsonl(run / "trajectories/rank0.jsonl"))) == 4
    assert len(list(read_jsonl(run / "trajectories-2/rank0.jsonl"))) == 8
