"""train.py, from the command line to the saved model, on a corpus and a model made for these tests."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_tiny_model import world, write
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser
from typer.testing import CliRunner

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.cli import train as training
from igpo_trl.cli.app import app
from igpo_trl.cli.arguments import ScriptArguments, TrainParser
from igpo_trl.data import SYSTEM_PROMPTS
from igpo_trl.data.english import world_file
from igpo_trl.evaluation.settings import settings_of_training
from igpo_trl.rollout.tool_failures import ToolUnavailable
from igpo_trl.sandbox.tiny_model import SYSTEM_PROMPT, make_tiny_model
from igpo_trl.search import BM25Index
from igpo_trl.search.indexes import bm25
from igpo_trl.trajectory import read_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    passages, questions = world()
    corpus, questions = write(folder / "corpus.jsonl", passages), write(folder / "questions.jsonl", questions)
    make_tiny_model(
        folder / "model",
        corpus,
        questions,
        minutes=30,  # `max_steps` ends the training, on a slow machine too
        max_steps=60,
        max_words=12,
        vocab_size=700,
        hidden_size=128,
        num_layers=2,
        batch_size=4,
        learning_rate=5e-3,
        show_progress=False,
    )
    return {"corpus": corpus, "questions": questions, "model": folder / "model"}


@pytest.fixture
def arguments(files, tmp_path, repository, monkeypatch) -> list[str]:
    """The shipped CPU recipe on the test's own files."""
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "cache"))
    options = {
        "config": repository / "configs/hotpotqa_cpu.yaml",
        "questions": files["questions"],
        "corpus": files["corpus"],
        "model_name_or_path": files["model"],
        "output_dir": tmp_path / "run",
        "num_eval_questions": 2,
        "search_max_words": 12,
        "max_steps": 2,
        "save_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_completion_length": 640,
        "disable_tqdm": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def parse(arguments: list[str]):
    return TrainParser().parse_args_and_config(arguments)


def test_trains_saves_and_resumes_from_the_command_line(arguments, repository, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    path = os.pathsep.join([str(repository / "src"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, "train.py", *arguments],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "5 questions to train on, 2 to evaluate on, 12 passages." in result.stdout
    assert sorted(json.loads((run / "evaluation.json").read_text())) == ["after", "before"]
    assert AutoModelForCausalLM.from_pretrained(run).num_parameters() > 0
    options = settings_of_training(run / "igpo.yaml")
    assert (options["max_words"], options["rollout"]["max_completion_length"]) == (12, 640)
    trajectories = list(read_jsonl(run / "trajectories/rank0.jsonl"))
    assert len(trajectories) == 8  # 2 steps of 4 rollouts
    assert {t.step for t in trajectories} == {0, 1}
    assert all(set(t.rewards) == {"answer_reward"} for t in trajectories)
    assert all(turn.info_gain is not None for t in trajectories for turn in t.turns[:-1])

    assert "FutureWarning" not in result.stderr
    assert "Beliefs are scored packed" in result.stderr and "The KV cache is kept" in result.stderr

    command = CliRunner().invoke(app, ["train", *arguments])
    assert command.exit_code == 1 and len(command.stderr.splitlines()) == 1
    assert "has checkpoints of an earlier run that is finished. Add --resume_from_checkpoint true" in command.stderr
    command = CliRunner().invoke(app, ["train", *arguments, "--resume_from_checkpoint", "true"])
    assert command.exit_code == 0 and "is done: checkpoint-2 is its last" in command.stdout
    assert len(list(read_jsonl(run / "trajectories/rank0.jsonl"))) == 8
    (run / "checkpoint-2/model.safetensors").unlink()  # as after a crash while saving
    before = json.loads((run / "evaluation.json").read_text())["before"]
    # As after a kill in step 3, during a write.
    path = run / "trajectories/rank0.jsonl"
    last = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + last.replace('"step": 1,', '"step": 2,') + "\n" + last[:50])
    more = [*arguments, "--resume_from_checkpoint", "true", "--max_steps", "3"]
    command = CliRunner().invoke(app, ["train", *more], catch_exceptions=False)
    assert command.exit_code == 0
    assert "checkpoint-2 is not whole: model.safetensors is missing. Resuming from" in command.stderr
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 3
    assert [t.step for t in read_jsonl(path)] == [0] * 4 + [1] * 4 + [2] * 4
    assert json.loads((run / "evaluation.json").read_text())["before"] == before


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM", "crash", "outage"])
def test_a_run_that_ends_early_says_how_to_resume_it(arguments, monkeypatch, tmp_path, stop):
    train = IGPOTrainer.train

    def stop_after_training(trainer, *args, **kwargs):
        train(trainer, *args, **kwargs)
        if stop == "crash":
            return [][0]
        if stop == "outage":
            raise ToolUnavailable("the tool search has failed.")
        os.kill(os.getpid(), getattr(signal, stop))
        time.sleep(60)

    monkeypatch.setattr(IGPOTrainer, "train", stop_after_training)
    monkeypatch.setattr(sys, "argv", ["igpo"])
    words = [*arguments, "--max_steps", "1", "--num_eval_questions", "0"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    try:
        result = CliRunner().invoke(app, ["train", *words])
    finally:
        signal.signal(signal.SIGINT, before)
    resume = f"To resume from {tmp_path / 'run/checkpoint-1'}:\n  igpo train {shlex.join(words)} "
    resume += "--resume_from_checkpoint true"
    if stop == "crash":
        assert isinstance(result.exception, IndexError) and result.exception.__notes__ == [resume]
    elif stop == "outage":
        assert result.exit_code == 1
        assert f"Error: the tool search has failed.\n{resume}\n" in result.stderr
    else:
        assert result.exit_code == {"SIGINT": 130, "SIGTERM": 143}[stop]
        assert f"Interrupted. {resume}" in result.stderr
        # The same command goes on, to the end.
        monkeypatch.setattr(IGPOTrainer, "train", train)
        again = CliRunner().invoke(app, ["train", *words, "--resume_from_checkpoint", "true"], catch_exceptions=False)
        assert again.exit_code == 0 and "Nothing is left to train" in again.stderr
        assert (tmp_path / "run/model.safetensors").is_file()


def test_an_evaluation_and_the_training_log_to_one_folder(arguments, tmp_path, monkeypatch):
    folders = []

    class Writer:  # TensorBoard is not among the packages of the tests
        def __init__(self, log_dir):
            folders.append(log_dir)
            Path(log_dir).mkdir(parents=True, exist_ok=True)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    options = [*arguments, "--max_steps", "1", "--report_to", "tensorboard"]
    training.run_training(*parse(options))
    training.run_training(*parse([*options, "--max_steps", "2", "--resume_from_checkpoint", "true"]))
    (folder,) = (tmp_path / "run/runs").iterdir()
    assert set(folders) == {str(folder)} and len(folders) >= 3  # before, while and after training


def test_a_misspelt_metric_is_found_before_training(arguments, monkeypatch):
    monkeypatch.setattr(IGPOTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    options = "--metric_for_best_model eval_f2 --load_best_model_at_end true --eval_strategy steps --eval_steps 1"
    result = CliRunner().invoke(app, ["train", *arguments, *options.split()])
    assert result.exit_code == 1
    assert "`metric_for_best_model`: the evaluation reports no eval_f2. Did you mean eval_f1" in result.stderr


def test_accelerate_configurations_leave_the_precision_to_the_recipe(repository):
    for path in (repository / "accelerate_configs").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no", path.name


def test_deepspeed_trains_the_cpu_recipe(arguments, repository, tmp_path):
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, "--config_file", "accelerate_configs/zero2.yaml", "train.py", *arguments, "--max_steps", "1"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository / "src"), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "FutureWarning" not in result.stderr
    # ZeRO-2 cannot evaluate before it trains; the evaluation before the first step must not be missing for that.
    assert sorted(json.loads((tmp_path / "run/evaluation.json").read_text())) == ["after", "before"]


def test_the_command_is_the_script(arguments, monkeypatch):
    passed = []
    monkeypatch.setattr(training, "run_training", lambda *parsed: passed.extend(parsed))
    result = CliRunner().invoke(app, ["train", *arguments, "--beta", "0.25"], catch_exceptions=False)
    assert result.exit_code == 0
    parser = TrlParser((ScriptArguments, IGPOConfig, ModelConfig))  # TRL's own
    expected = parser.parse_args_and_config([*arguments, "--beta", "0.25"])
    assert [vars(one) for one in passed[::2]] == [vars(one) for one in expected[::2]]
    assert passed[1].beta == 0.25
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("usage: igpo train")
    assert all(name in result.output for name in ("--questions", "--info_gain_weight", "--lora_r"))


def test_trains_grpo_with_lora_and_an_index(arguments, tmp_path, files):
    BM25Index.build(files["corpus"], show_progress=False).save(tmp_path / "index")
    options = "--method grpo --max_steps 1 --num_eval_questions 0 --use_peft true --lora_r 4 --reward_weights 0.5"
    more = [*options.split(), "--info_gain_weight_end", "1.0", "--index", str(tmp_path / "index")]
    training.run_training(*parse([*arguments, *more]))
    assert (tmp_path / "run/adapter_model.safetensors").exists()
    assert not (tmp_path / "run/evaluation.json").exists()
    assert not (tmp_path / "cache").exists()  # the given index was used
    trajectories = list(read_jsonl(tmp_path / "run/trajectories/rank0.jsonl"))
    assert [t.outcome for t in trajectories] == [0.5 * t.rewards["answer_reward"] for t in trajectories]
    assert any(t.outcome for t in trajectories)
    # GRPO's advantages: one per rollout, and no beliefs.
    assert all(len({turn.advantage for turn in t.turns}) == 1 for t in trajectories)
    assert all(turn.belief is None and turn.info_gain is None for t in trajectories for turn in t.turns)


def test_grpo_has_the_rollouts_and_the_evaluation_of_igpo(arguments, tmp_path):
    before, rewards = [], []
    for options in ("igpo", "grpo --normalization critic"):
        folder = tmp_path / options[:4]
        training.run_training(
            *parse([*arguments, "--method", *options.split(), "--max_steps", "1", "--output_dir", str(folder)])
        )
        before.append(json.loads((folder / "evaluation.json").read_text())["before"])
        rewards.append([t.rewards for t in read_jsonl(folder / "trajectories/rank0.jsonl")])
    assert before[0] == before[1] and set(before[0]) == {"f1", "exact_match", "reward", "searches", "tokens"}
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--questions", "absent.jsonl"], FileNotFoundError, "`questions`: no such file: absent.jsonl"),
        (["--corpus", "absent.jsonl"], FileNotFoundError, "`corpus`: no such file: absent.jsonl"),
        (["--eval_questions", "absent.jsonl"], FileNotFoundError, "`eval_questions`: no such file"),
        (["--model_name_or_path", "./absent"], FileNotFoundError, "igpo tiny-model"),
        (["--model_name_or_path", "outputs/absent"], FileNotFoundError, "igpo tiny-model"),
        (["--method", "ppo"], ValueError, "igpo or grpo, got 'ppo'"),
        (["--search_k", "0"], ValueError, "`search_k` must be at least 1"),
        (["--num_eval_questions", "-1"], ValueError, "must not be negative"),
        (["--num_eval_questions", "7"], ValueError, "cannot hold out 7 of 7"),
        (["--resume_from_checkpoint", "absent"], FileNotFoundError, "`resume_from_checkpoint`: no such directory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, monkeypatch, options, error, message):
    monkeypatch.setattr(training, "open_or_build_index", lambda script: pytest.fail("the index was loaded"))
    with pytest.raises(error, match=message):
        training.run_training(*parse([*arguments, *options]))


@pytest.fixture
def server(files, tmp_path, repository):
    """The address of a process that serves the index of the test's corpus."""
    BM25Index.build(files["corpus"], show_progress=False).save(tmp_path / "served")
    process = subprocess.Popen(
        [sys.executable, "-m", "igpo_trl", "serve", "--index", str(tmp_path / "served"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository / "src"), "PYTHONUNBUFFERED": "1"},
    )
    address = next(match for line in process.stdout if (match := re.search(r"http://[\w.]+:\d+", line)))
    yield address.group()
    process.terminate()
    process.stdout.close()
    assert process.wait(timeout=30) in (0, -signal.SIGTERM)


def test_trains_on_a_search_server_and_on_several_sets(arguments, files, server, tmp_path, capsys):
    rows = [json.loads(line) for line in files["questions"].read_text().splitlines()]
    sets = [
        write(tmp_path / f"{name}.jsonl", [row | {"dataset": name} for row in rows[:3]]) for name in ("nq", "popqa")
    ]
    options = {
        "index": server,
        "eval_questions": ",".join(map(str, sets)),
        "num_eval_questions": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
        "metric_for_best_model": "eval_nq_f1",
        "load_best_model_at_end": "true",
        "search_many_queries": "true",
    }
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    others = [word for word in arguments if word not in ("--corpus", str(files["corpus"]))]
    training.run_training(*parse([*others, *more]))
    after = json.loads((tmp_path / "run/evaluation.json").read_text())["after"]
    assert set(after["sets"]) == {"nq", "popqa"}
    (first, *_) = read_jsonl(tmp_path / "run/trajectories/rank0.jsonl")
    assert '"type": "array"' in first.prompt  # the schema that the policy reads takes several queries
    assert after["searches"] == sum(of["searches"] for of in after["sets"].values()) / 2
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["best_metric"] is not None
    # The server gives the results of the index. (A model this small seldom makes a valid call.)
    script, *_ = parse([*others, *more])
    query = rows[0]["question"]
    results = [passage.id for passage in training.open_or_build_index(script).search(query, 3)]
    assert results == [passage.id for passage in BM25Index.load(tmp_path / "served").search(query, 3)] != []
    assert not (tmp_path / "cache").exists()


def test_an_unreachable_search_server_is_reported_before_the_model_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(training, "IGPOTrainer", lambda **_: pytest.fail("the model was loaded"))
    with pytest.raises(Exception, match="127.0.0.1:9"):
        training.run_training(*parse([*arguments, "--index", "http://127.0.0.1:9"]))


def test_the_corpus_of_a_recipe_may_be_missing_where_an_index_is_given(arguments, files, tmp_path):
    script, config, model = parse([*arguments, "--corpus", str(tmp_path / "missing.jsonl")])
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        training.check_arguments(script, config, model)
    script.index = "http://127.0.0.1:9"
    training.check_arguments(script, config, model)
    script.index = str(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):  # it would be built
        training.check_arguments(script, config, model)
    BM25Index.build(files["corpus"], show_progress=False).save(script.index)
    training.check_arguments(script, config, model)


@pytest.mark.parametrize(("prompt", "warns"), [("think", True), ("no_think", True), ("Call final_answer.", False)])
def test_a_prompt_that_asks_for_another_form_of_answer_than_the_stop_tool(arguments, prompt, warns, recwarn):
    training.check_arguments(*parse([*arguments, "--stop_tools", "final_answer", "--system_prompt", prompt]))
    assert any("asks for a call of final_answer" in str(warning.message) for warning in recwarn) == warns
    with pytest.raises(ValueError, match="`stop_tools` names submit, expected final_answer"):
        training.check_arguments(*parse([*arguments, "--stop_tools", "submit"]))


def test_missing_passages_are_refused(arguments):
    script, config, model = parse(arguments)
    script.corpus = None
    with pytest.raises(ValueError, match="`corpus`"):
        training.run_training(script, config, model)


def test_index_is_built_once_per_corpus(arguments, files, tmp_path, monkeypatch):
    script, *_ = parse([*arguments, "--corpus", str(write(tmp_path / "c.jsonl", world()[0]))])
    assert len(training.open_or_build_index(script)) == 12
    with monkeypatch.context() as patch:
        patch.setattr(BM25Index, "build", lambda *_, **__: pytest.fail("the index was built again"))
        assert len(training.open_or_build_index(script)) == 12
    write(tmp_path / "c.jsonl", world()[0][:3])
    assert len(training.open_or_build_index(script)) == 3


def test_a_second_run_waits_for_an_index_that_is_being_built(arguments, monkeypatch):
    script, *_ = parse(arguments)
    build, calls = bm25._index, []

    def build_slowly(*parts):
        calls.append(parts)
        time.sleep(0.5)
        return build(*parts)

    monkeypatch.setattr(bm25, "_index", build_slowly)
    with ThreadPoolExecutor(2) as pool:
        indexes = list(pool.map(training.open_or_build_index, [script, script]))
    assert [len(index) for index in indexes] == [12, 12]
    assert len(calls) == 1


def test_a_damaged_index_is_rebuilt_in_the_cache_and_reported_elsewhere(arguments, tmp_path):
    script, *_ = parse(arguments)
    training.open_or_build_index(script)
    (cached,) = (tmp_path / "cache/bm25").iterdir()
    (cached / "vocab.index.json").write_text("{}")
    assert len(training.open_or_build_index(script)) == 12
    (cached / "vocab.index.json").write_text("{}")
    script.index = str(cached)
    with pytest.raises(ValueError, match="incomplete"):
        training.open_or_build_index(script)


@pytest.mark.parametrize("name", ["think", "no_think", "none", "Be brief."])
def test_system_prompts(arguments, name):
    script, *_ = parse([*arguments, "--system_prompt", name])
    first = training.load_data(script)[0][0]["prompt"][0]
    assert first["content"] == SYSTEM_PROMPTS.get(name, name) if name != "none" else first["role"] == "user"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_hold_known_arguments(path):
    options = ["--config", str(path), "--use_cpu", "true", "--bf16", "false"]
    script, config, model = parse(options)
    assert model.model_name_or_path
    assert config.generation_batch_size % config.num_generations == 0
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    if path.stem == "hotpotqa_cpu":
        assert script.system_prompt == SYSTEM_PROMPT


def test_the_corpus_may_be_the_world_in_english():
    assert ScriptArguments("world", corpus="world").corpus == str(world_file("corpus"))
    assert ScriptArguments("world").corpus is None
