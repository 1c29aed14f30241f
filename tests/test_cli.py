"""The command line: arguments, the calls that it makes, and its output."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from igpo_trl import __version__
from igpo_trl.cli.app import app
from igpo_trl.trajectory import Trajectory, Turn, write_jsonl


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def rollouts(tmp_path):
    path = tmp_path / "rank0.jsonl"
    write_jsonl(
        path,
        [
            Trajectory(
                "Who?", [Turn("looking", "a page", 3, 0.25, 0.5), Turn(f"<answer>{name}</answer>", belief=0.75)]
            )
            for name in ("Ada", "Ben", "Cleo")
        ],
    )
    return path


def test_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"igpo-trl {__version__}"


@pytest.mark.parametrize("command", ["demo", "tiny-model", "view"])
def test_every_command_has_help(run, command):
    assert command in run("--help").output
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_module_is_the_command_and_starts_fast():
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "igpo_trl", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: igpo " in result.stdout
    # It takes half a second on an idle machine. Importing torch and TRL would take ten times as long.
    assert time.perf_counter() - started < 5


def test_demo_passes_its_options_on(run, monkeypatch):
    from igpo_trl.sandbox import demo

    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: calls.append(options))
    assert run("demo").exit_code == 0
    assert run("demo", "--quick").exit_code == 0
    assert run("demo", "--quick", "--output-dir", "somewhere", "--seed", 3).exit_code == 0
    assert calls == [
        {"output_dir": Path("outputs/demo"), "quick": False, "seed": 0},
        {"output_dir": Path("outputs/demo-quick"), "quick": True, "seed": 0},
        {"output_dir": Path("somewhere"), "quick": True, "seed": 3},
    ]


def test_a_quick_demo_does_not_replace_a_full_one(run, tmp_path):
    for method in ("warm_start", "grpo_batch", "igpo_paper", "igpo_critic"):
        (tmp_path / method).mkdir()
        (tmp_path / method / "test_greedy.jsonl").write_text("")
    result = run("demo", "--quick", "--output-dir", tmp_path)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and "files of a full demo" in result.output
    assert len(result.output.splitlines()) == 1


def test_tiny_model_has_the_defaults_of_the_function(run, monkeypatch, tmp_path):
    import inspect

    from igpo_trl.sandbox import tiny_model

    signature = inspect.signature(tiny_model.make_tiny_model)
    calls = []

    def fake(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        return {"parameters": 5.1e6, "steps": 7, "loss": 2.5, "valid_search_share": 0.875}

    monkeypatch.setattr(tiny_model, "make_tiny_model", fake)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("")
    result = run("tiny-model", tmp_path / "model", "--corpus", corpus, "--questions", corpus)
    assert result.exit_code == 0, result.output
    assert "5.1 M parameters, 7 steps, loss 2.50; 88% of sampled rollouts" in result.output
    for name, value in calls[0].items():
        default = signature.parameters[name].default
        assert default is inspect.Parameter.empty or value == default, name


def test_tiny_model_reports_missing_files_and_a_used_folder(run, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    result = run("tiny-model", tmp_path / "model", "--corpus", corpus, "--questions", corpus)
    assert result.exit_code == 2 and "does not exist" in result.output
    corpus.write_text("")
    result = run("tiny-model", tmp_path, "--corpus", corpus, "--questions", corpus)
    assert result.exit_code == 2 and "is not empty" in result.output


@pytest.mark.parametrize(("index", "name"), [(0, "Ada"), (2, "Cleo"), (-1, "Cleo")])
def test_view_prints_one_rollout(run, rollouts, index, name):
    result = run("view", rollouts, "--index", index)
    assert result.exit_code == 0
    assert f"answer: {name}" in result.output
    assert "belief" in result.output and "gain +0.50" in result.output


def test_view_saves_the_picture(run, rollouts, tmp_path):
    result = run("view", rollouts, "--save", tmp_path / "rollout.png")
    assert result.exit_code == 0
    assert (tmp_path / "rollout.png").stat().st_size > 1000


@pytest.mark.parametrize("index", [3, -4])
def test_view_refuses_an_index_out_of_range(run, rollouts, index):
    result = run("view", rollouts, "--index", index)
    assert result.exit_code == 2
    assert "3 rollouts" in result.output


def test_mistakes_are_one_line_and_show_a_traceback_with_debug(run, rollouts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    picture = tmp_path / "file" / "rollout.png"
    result = run("view", rollouts, "--save", picture)
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {picture.parent}: file exists. A file is in the way: choose another path, or remove it.\n",
    )
    for words in (["--debug", "view", rollouts, "--save", picture], ["view", "--debug", rollouts, "--save", picture]):
        result = run(*words)
        assert result.exit_code == 1 and isinstance(result.exception, FileExistsError)
    assert isinstance(run("view", rollouts, "--save", picture).exception, SystemExit)
    # A bug keeps its traceback.
    monkeypatch.setattr("igpo_trl.report.render_trajectory", lambda _: [][0])
    assert isinstance(run("view", rollouts).exception, IndexError)


def test_tiny_model_says_which_file_is_wrong(run, tmp_path):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text('{"body": "a"}\n')
    questions.write_text('{"question": "Who?"}\n')
    result = run("tiny-model", tmp_path / "model", "--corpus", corpus, "--questions", questions)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {questions}:1 ") and len(result.stderr.splitlines()) == 1
    result = run("tiny-model", corpus / "model", "--corpus", corpus, "--questions", questions)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"cannot write to {corpus} (file exists). Choose another directory" in result.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["view", "absent.jsonl"], 2, "'absent.jsonl' does not exist. `igpo view --help` shows the options."),
        (["view"], 2, "Missing argument 'run'. `igpo view --help`"),
        (["view", "--indx", "1"], 2, "No such option: --indx"),
        (["search", "Who?"], 2, "Missing option '--index'. `igpo search --help`"),
        (["search", "Who?", "--index", "absent"], 1, "absent"),
        (["search", "Who?", "--index", "localhost:8000"], 1, "http://localhost:8000"),
        (["serve", "--index", "absent"], 1, "absent"),
        (["index", "--corpus", "absent.jsonl", "--out", "index"], 1, "no such file: absent.jsonl"),
        (["data", "show", "absent.jsonl"], 2, "no such file: absent.jsonl"),
        (
            ["eval", "--model", "./absent", "--data", "nq", "--index", "i", "--out", "o"],
            1,
            "no such directory: ./absent",
        ),
        (["eval", "table", "absent"], 2, "'absent' does not exist. `igpo eval table --help`"),
    ],
)
def test_a_mistake_in_any_command_is_one_line(run, tmp_path, monkeypatch, words, status, message):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == status
    assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_view_names_the_line_that_is_not_a_rollout(run, rollouts):
    rollouts.write_text(rollouts.read_text() + "{}\n")
    result = run("view", rollouts)
    assert result.exit_code == 2
    assert "line 4" in result.output
