"""Mistakes in the arguments of `igpo train`: one line that says what was got and what to do, and no traceback."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_tiny_model import world, write
from trl import ModelConfig
from typer.testing import CliRunner

from igpo_trl import IGPOConfig
from igpo_trl.cli import checks
from igpo_trl.cli import train as training
from igpo_trl.cli.app import app
from igpo_trl.search import BM25Index
from igpo_trl.warm_start import fitting


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Questions, passages, an index, and what looks like models and adapters, but has no weights."""
    folder = tmp_path_factory.mktemp("mistakes")
    passages, questions = world()
    write(folder / "corpus.jsonl", passages)
    write(folder / "questions.jsonl", questions)
    BM25Index.build(folder / "corpus.jsonl", show_progress=False).save(folder / "index")
    tiny.make_model("qwen3").config.save_pretrained(folder / "model")
    (folder / "file").write_text("text")
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "no_answers.jsonl").write_text('{"question": "Who?"}\n')
    (folder / "text.jsonl").write_text("hello\n")
    (folder / "empty.yaml").write_text("")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "syntax.yaml").write_text("max_steps: 1\nquestions: [a\nb: c\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "unknown.yaml").write_text("num_generation: 4\n")
    (folder / "dash.yaml").write_text("learning-rate: 4\n")
    (folder / "text.yaml").write_text("max_steps: five\n")
    (folder / "float.yaml").write_text("search_k: 2.5\n")
    (folder / "several.yaml").write_text("learning_rate: [1, 2]\n")
    (folder / "mapping.yaml").write_text("questions: {a: 1}\n")
    (folder / "bool.yaml").write_text("use_cpu: 7\n")
    for name, config in {
        "no_base": {"peft_type": "LORA"},
        "lost_base": {"base_model_name_or_path": "/nowhere/model"},
        "no_weights": {"base_model_name_or_path": str(folder / "model")},
        "adapter": {"base_model_name_or_path": str(folder / "model")},
    }.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        if name != "no_weights":
            save_file({"weight": torch.zeros(2)}, folder / name / "adapter_model.safetensors")
    (folder / "cut_off").mkdir()
    (folder / "cut_off/model.safetensors").write_bytes(
        (folder / "adapter/adapter_model.safetensors").read_bytes()[:-1]
    )
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs `igpo train` with options; a model must not be loaded."""
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "IGPOTrainer", lambda **_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(folder)

    def run(*options: str):
        given = {option.partition("=")[0] for option in options}
        defaults = {
            "--questions": "questions.jsonl", "--corpus": "corpus.jsonl", "--model_name_or_path": "./model",
            "--output_dir": str(tmp_path / "run"), "--use_cpu": "true", "--num_generations": "2",
            "--num_eval_questions": "2",
        }  # fmt: skip
        if "--config" in given:
            defaults = {name: value for name, value in defaults.items() if name in ("--questions", "--output_dir")}
        words = [word for name, value in defaults.items() if name not in given for word in (name, value)]
        return CliRunner().invoke(app, ["train", *words, *options])

    return run


MISTAKES = {
    "--config=absent.yaml": "`--config`: no such file: absent.yaml",
    "--config=empty": "`--config`: this is a directory",
    "--config=empty.yaml": "empty.yaml: expected lines `option: value`, got an empty file",
    "--config=list.yaml": "list.yaml: expected lines `option: value`, got list",
    "--config=syntax.yaml": "syntax.yaml:3: not YAML",
    "--config=binary.yaml": "binary.yaml: not YAML",
    "--config=unknown.yaml": "unknown option `num_generation`. Did you mean `num_generations`",
    "--config=dash.yaml": "unknown option `learning-rate`. Did you mean `learning_rate`",
    "--config=text.yaml": "`max_steps`: got 'five', expected a whole number",
    "--config=float.yaml": "`search_k`: got '2.5', expected a whole number",
    "--config=several.yaml": "`learning_rate` is [1, 2], expected one value",
    "--config=mapping.yaml": "`questions` is {'a': 1}, expected one value",
    "--config=bool.yaml": "`use_cpu`: got '7', expected true or false",
    "--config": "--config needs a value",
    "--num_generation 4": "unknown option --num_generation. Did you mean --num_generations",
    "--lerning-rate 4": "unknown option --lerning-rate. Did you mean --learning_rate",
    "--serch_k=4": "Did you mean --search_k",
    "--zzz 1": "`igpo train --help-all` lists all options",
    "--max_steps five": "`max_steps`: got 'five', expected a whole number",
    "--max_turns five": "`max_turns`: got 'five', expected a whole number",
    "--learning_rate small": "`learning_rate`: got 'small', expected a number",
    "--use_peft maybe": "`use_peft`: got 'maybe', expected true or false",
    "--bf16 maybe": "`bf16`: got 'maybe', expected true or false",
    "--max_steps": "`max_steps`: the value is missing",
    "recipe.yaml": "got 'recipe.yaml' where an option was expected. Write --config FILE",
    "--optim adamm": "`optim`: got 'adamm'. Did you mean ada",
    "--lr_scheduler_type cosin": "Did you mean cosine",
    "--save_strategy sometimes": "Expected one of no, steps, epoch, best",
    "--info_gain difference": "must be one of prob_diff, log_prob_diff, log_gap, first_seen, got 'difference'",
    "--model_init_kwargs {bad": "`model_init_kwargs`: got '{bad', expected JSON",
    "--chat_template_kwargs x": "`chat_template_kwargs`: got 'x', expected JSON",
    "--questions absent.jsonl": "`questions`: no such file: absent.jsonl",
    "--questions hotpot": "Did you mean hotpotqa?",
    "--questions file.xlsx": "no data set of that name: file.xlsx. Expected a file (.jsonl,",
    "--questions no_answers.jsonl": "no_answers.jsonl:1 (row 0): no column `answers`",
    "--questions empty.jsonl": "empty.jsonl holds no questions",
    "--questions text.jsonl": "text.jsonl:1: not valid JSON",
    "--eval_questions absent.jsonl": "`eval_questions`: no such file",
    "--num_eval_questions 70": "cannot hold out 70 of 7 questions",
    "--corpus absent.jsonl": "`corpus`: no such file: absent.jsonl",
    "--corpus empty": "`corpus`: this is a directory: empty",
    "--corpus text.jsonl": "text.jsonl:1: not valid JSON",
    "--corpus empty.jsonl": "empty.jsonl is empty",
    "--corpus no_answers.jsonl": "no field `id`; got ['question']",
    "--index indx": "`index`: no index in indx. Did you mean index? To build one there: igpo index",
    "--index 127.0.0.1:8000": "begins with http://, as http://127.0.0.1:8000",
    "--index localhost:8000/retrieve": "begins with http://, as http://localhost:8000/retrieve",
    "--index htp://127.0.0.1:8000": "expected the directory of an index, or an http:// or https:// address",
    "--index http://127.0.0.1:9": "127.0.0.1:9",
    "--index model": "model",
    "--index file": "file",
    "--model_name_or_path ./absent": "no such model directory: ./absent. To make a tiny model",
    "--model_name_or_path ./file": "this is a file, not a model's directory: ./file",
    "--model_name_or_path empty": "`model_name_or_path`: no config.json in empty: it is not a model",
    "--model_name_or_path nobody/absent": "nobody/absent is neither a directory here nor a model",
    "--model_name_or_path cut_off": "cut_off/model.safetensors is cut off. Copy or save the model again",
    "--model_name_or_path no_base": "names no base model",
    "--model_name_or_path lost_base": "no such directory: /nowhere/model",
    "--model_name_or_path no_weights": "no adapter_model.safetensors in no_weights",
    "--model_name_or_path adapter --use_peft true": "`peft_config` (`use_peft`) asks for a new one",
    "--output_dir file": "`output_dir`: cannot write to file (file exists). Choose another directory",
    "--output_dir file/run": "`output_dir`: cannot write to file/run (not a directory)",
    "--output_dir /proc/no/run": "`output_dir`: cannot write to /proc/no/run",
    "--resume_from_checkpoint absent": "`resume_from_checkpoint`: no such directory: absent",
    "--resume_from_checkpoint empty": "empty is not a whole checkpoint: trainer_state.json is missing",
    "--system_prompt thinks": "Did you mean think?",
    "--system_prompt absent.txt": "no such file of a system prompt: absent.txt",
    "--method ppo": "`method` must be igpo or grpo, got 'ppo'",
    "--search_k 0": "`search_k` must be at least 1, got 0",
    "--per_device_train_batch_size 0": "`per_device_train_batch_size` must be at least 1, got 0",
    "--temperature=-1": "`temperature` must be at least 0, got -1",
    "--learning_rate=-1": "`learning_rate` must be at least 0, got -1",
    "--num_generations 3": "must be divisible by num_generations (3)",
    "--loss_type foo": "`loss_type` must be one of grpo, dr_grpo, dapo",
    "--scale_rewards foo": "`scale_rewards` must be one of group, batch, none, got 'foo'",
    "--gamma 1.5": "`gamma` must lie between 0 and 1, got 1.5",
    "--fp16 true --bf16 true": "At most one of fp16 and bf16",
    "--use_cpu false --bf16 true": "Set `bf16=False` to train in float32, and `use_cpu=True` to train on the CPU",
    "--report_to tensorbord": "`report_to`: tensorbord is not known. Did you mean tensorboard?",
    "--load_best_model_at_end true": "load_best_model_at_end",
    "--deepspeed absent.json": "absent.json",
    "--use_liger_kernel true": "liger",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(run, tmp_path, options):
    words = options.split()
    if options == "--use_liger_kernel true" and importlib.util.find_spec("liger_kernel"):
        pytest.skip("it is installed")
    if options.startswith("--deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    if options == "--use_cpu false --bf16 true" and os.environ["CUDA_VISIBLE_DEVICES"]:
        pytest.skip("needs a machine without a GPU")
    result = run(*words)
    assert result.exit_code in (1, 2)
    lines = [line for line in result.stderr.splitlines() if "Warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    assert MISTAKES[options] in lines[0]
    assert not (tmp_path / "indx").exists() and not (tmp_path / "run" / "trajectories").exists()


@pytest.mark.parametrize("options", ["--max_steps five", "--questions absent.jsonl", "--config=syntax.yaml"])
def test_debug_shows_the_traceback(run, options):
    for words in (["--debug", *options.split()], [*options.split(), "--debug"]):
        assert isinstance(run(*words).exception, OSError | ValueError)


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(training, "load_data", lambda script: script.absent)
    assert isinstance(run().exception, AttributeError)


def test_yaml_values_are_read_as_on_the_command_line(run, monkeypatch, tmp_path):
    parsed = []
    monkeypatch.setattr(training, "run_training", lambda *each: parsed.append(each))
    (tmp_path / "config.yaml").write_text(
        "learning_rate: 1e-5\nmax_turns: null\nlora_target_modules: [q_proj, k_proj]\neval_strategy: no\n"
        "chat_template_kwargs: {enable_thinking: false}\nreport_to: [tensorboard]\n"
        "system_prompt: '- Search. --twice'\nbeta: 1\nuse_cpu: yes\nmax_steps: 5\n"
        "resume_from_checkpoint: true\nmodel_name_or_path: m\n"
        "reward_weights: [0.5]\nenv: {IGPO_TEST_VALUE: 7}\n"
    )
    monkeypatch.setenv("IGPO_TEST_VALUE", "")
    result = run("--config", str(tmp_path / "config.yaml"), "--max-steps", "6")
    assert result.exit_code == 0, result.stderr
    ((script, config, model),) = parsed
    assert (config.learning_rate, config.beta, config.max_steps, config.max_turns) == (1e-5, 1.0, 6, None)
    assert model.lora_target_modules == ["q_proj", "k_proj"]
    assert (config.eval_strategy, config.report_to, config.reward_weights) == ("no", ["tensorboard"], [0.5])
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert (script.system_prompt, config.resume_from_checkpoint) == ("- Search. --twice", "true")
    assert os.environ["IGPO_TEST_VALUE"] == "7"


def test_the_help_is_ours_and_that_of_all_options_is_separate():
    short = CliRunner().invoke(app, ["train", "--help"]).stdout
    full = CliRunner().invoke(app, ["train", "--help-all"]).stdout
    assert len(short.splitlines()) < 320 < len(full.splitlines())
    for name in ("config", "debug", "questions", "corpus", "index", "search_k", "info_gain_weight", "lora_r"):
        assert f"--{name}" in short
    assert short.index("--questions") < short.index("--info_gain_weight") < short.index("--output_dir")
    assert "--adam_beta1" not in short and "--adam_beta1" in full
    assert "--reuse_prefixes  [True]" in short


def test_the_line_is_seen_below_a_launcher(folder, repository):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(repository / "accelerate_configs/cpu.yaml")]
    launcher += ["--quiet", str(repository / "train.py")]
    result = subprocess.run(
        [sys.executable, *launcher, "--questions", "absent.jsonl", "--num_generation", "2"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repository / "src")},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "Error: unknown option --num_generation. Did you mean --num_generations" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) < 5


@pytest.mark.skipif(bool(os.environ.get("CUDA_VISIBLE_DEVICES")), reason="needs a machine without a GPU")
def test_without_bfloat16_training_is_in_float32_unless_it_was_asked_for(tmp_path):
    assert IGPOConfig(str(tmp_path)).bf16 is False
    assert IGPOConfig(str(tmp_path), use_cpu=True).bf16 is True  # TRL's default
    with pytest.raises(ValueError, match=r"Set `bf16=False` to train in float32, and `use_cpu=True`"):
        IGPOConfig(str(tmp_path), bf16=True)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bf16, dtype", [(True, "float32"), (False, "bfloat16"), (False, "float32")])
def test_slow_bfloat16_is_warned_of(tmp_path, monkeypatch, fast, bf16, dtype):
    monkeypatch.setattr(fitting, "computes_in_bfloat16", lambda: fast)
    monkeypatch.setattr(checks.platform, "machine", lambda: "x86_64")
    args = IGPOConfig(str(tmp_path), use_cpu=True, bf16=bf16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks.check_precision(args, ModelConfig(dtype=dtype))
    assert ["more slowly than float32" in str(warning.message) for warning in caught] == [True] * (
        not fast and (bf16 or dtype == "bfloat16")
    )


def test_a_configuration_does_not_warn_of_what_trl_sets(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = IGPOConfig(str(tmp_path), gradient_checkpointing=False, use_cpu=True)
    # transformers 5.13 has no second name of it.
    assert args.gradient_checkpointing is getattr(args, "activation_checkpointing", False) is False
