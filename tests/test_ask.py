"""`igpo ask`: one rollout, shown while it is made."""

import io
import json
import re

import pytest
import tiny
from rich.console import Console
from rich.live import Live
from test_tiny_model import world, write
from typer.testing import CliRunner

from igpo_trl import IGPOConfig
from igpo_trl.cli.app import app
from igpo_trl.cli.arguments import ScriptArguments
from igpo_trl.evaluation.asking import SHOWN_CHARACTERS, Asker
from igpo_trl.evaluation.rollouts import EvaluationTrainer
from igpo_trl.evaluation.settings import EvaluationSettings, make_settings, save_options, saved_options
from igpo_trl.report import format_belief
from igpo_trl.search import BM25Index

QUESTION = "Which city is named after a river?"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of random weights, and an index with one long passage."""
    folder = tmp_path_factory.mktemp("files")
    passages = [*world()[0], {"id": "long", "title": "Oslo", "text": "The city. " + "It is large. " * 40 + "The end."}]
    BM25Index.build(write(folder / "corpus.jsonl", passages), show_progress=False).save(folder / "index")
    tiny.make_model(max_position_embeddings=4000).save_pretrained(folder / "model")
    tiny.make_tokenizer().save_pretrained(folder / "model")
    return folder


class Scripted(tiny.Scripted, EvaluationTrainer):
    scripts = ([tiny.call("city Oslo"), "<think>Enough.</think>" + tiny.answer("Oslo")],)


@pytest.fixture
def ask(files, monkeypatch):
    """Runs the command with a model that says `Scripted.scripts`; returns its result."""
    monkeypatch.setattr("igpo_trl.evaluation.rollouts.EvaluationTrainer", Scripted)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words, index=files / "index", model=files / "model", **options):
        given = ["--model", model, "--index", index, "--max-completion-length", 2000, *words]
        return CliRunner().invoke(app, ["ask", *map(str, given)], **options)

    return run


def order(text, *parts):
    """Whether the parts stand in the text in this order."""
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL)


def test_a_rollout_is_shown_from_the_first_search_to_the_answer(ask):
    result = ask("--k", 1, "Which", "city?")
    assert result.exit_code == 0, result.output
    assert order(result.output, "Turn 1", 'search(query="city Oslo")\n', "→ [1] Oslo The city. It is", "Turn 2")
    assert order(result.output, "Turn 2", "Enough.", "answer: Oslo", "Answer    Oslo")
    assert "default options" in result.output and "1 passages of at most 200 words, prompt 'think'" in result.output
    assert "belief" not in result.output.lower() and "Ended by" not in result.output


def test_results_are_cut_unless_all_is_wanted(ask):
    for words, is_whole in ([], False), (["--full"], True):
        output = " ".join(ask("--k", 1, QUESTION, *words).output.split())
        observation = output[output.index("→") : output.index("Turn 2")]
        assert ("The end." in observation) == is_whole
        assert is_whole or len(observation) <= SHOWN_CHARACTERS + 4


def test_the_belief_after_every_turn(ask, files, tmp_path):
    result = ask("--answer", "Oslo", "--answer", "Christiania", QUESTION)
    assert result.exit_code == 0, result.output
    assert order(result.output, "Answer    Oslo  F1 1.00", "Belief in Oslo | Christiania", "before the first turn")
    shown = re.findall(r"(before the first turn|after turn \d) +belief [█░]+ (\S+)", result.output)
    settings = make_settings({"model": str(files / "model"), "sources": ["x"], "indexes": [str(files / "index")]})
    rollout = Asker(settings, Console(file=io.StringIO()), str(tmp_path)).ask(QUESTION, ["Oslo", "Christiania"])
    assert [name for name, _ in shown] == ["before the first turn", "after turn 1"]
    assert [value for _, value in shown] == [format_belief(belief) for belief in rollout.beliefs]
    assert rollout.stop_reason == "answered" and rollout.info["searches"] == 1


def test_questions_can_be_typed_one_after_the_other(ask):
    result = ask("--k", 1, input=f"{QUESTION}\n\n  Who?  \n")
    assert result.exit_code == 0, result.output
    assert result.output.count("Answer    Oslo") == 2
    once = ask("--k", 1, QUESTION).output.split("Turn 1")[1]
    for rollout in result.output.split("Turn 1")[1:]:  # the first leaves nothing to the second
        assert rollout.split() == once.split()


def test_a_failed_search_ends_one_question_only(ask, monkeypatch):
    monkeypatch.setattr("igpo_trl.search.network.http_requests.FIRST_PAUSE", 0.01)
    result = ask(index="http://127.0.0.1:9", input="One?\nTwo?\n")
    assert result.exit_code == 0 and result.output.count("Error: searches have failed") == 2, result.output
    result = ask("One?", index="http://127.0.0.1:9")
    assert result.exit_code == 1 and "Error: searches have failed" in result.stderr


def test_why_it_ended_if_not_with_an_answer(ask, monkeypatch):
    monkeypatch.setattr(Scripted, "scripts", ([tiny.call("city")] * 3,))
    output = ask("--max-turns", 2, QUESTION).output
    assert order(output, "Answer    none", "Ended by  turn_limit")
    assert order(ask("--max-completion-length", 200, QUESTION).output, "Turn 1", "Ended by  length_limit")
    monkeypatch.setattr(Scripted, "scripts", ([tiny.call("Rome", "final_answer").replace("query", "answer")],))
    output = ask("--stop-tools", "final_answer", QUESTION).output
    assert order(output, 'final_answer(answer="Rome")', "Answer    Rome", "Ended by  stop_tool")


def test_what_is_read_last_is_shown_too(ask, files, tmp_path):
    """After it there is no room for another turn."""
    settings = make_settings({"model": str(files / "model"), "sources": ["x"], "indexes": [str(files / "index")]})
    rollout = Asker(settings, Console(file=io.StringIO()), str(tmp_path)).ask(QUESTION)
    room = rollout.turns[0].num_tokens + rollout.info["tokens_observed"]
    output = ask("--max-completion-length", room, QUESTION).output
    assert order(output, "Turn 1", "→ [1] Oslo", "Answer    none", "Ended by  length_limit") and "Turn 2" not in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--index", "absent", "Who?"], "no index in absent"),
        (["--model", "./absent", "Who?"], "no such directory: ./absent"),
        (["--answer", "Oslo"], "give the question too"),
        (["--max-turns", "0", "Who?"], "`max_turns` must be at least 1, got 0"),
        (["--stop-tools", "submit", "Who?"], "`stop_tools` names submit, expected final_answer"),
    ],
)
def test_mistakes_are_one_line(ask, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    result = ask(*words)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert says in " ".join(result.stderr.split()) and len(result.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------- as the model was trained


def test_the_options_that_a_model_was_trained_with(tmp_path, ask):
    script = ScriptArguments("nq", system_prompt="no_think", search_k=2, search_max_words=40)
    training = IGPOConfig(str(tmp_path), max_turns=3, max_completion_length=900, use_cpu=True, bf16=False)
    save_options(tmp_path, script, training)
    for name in ("checkpoint-5", "other"):
        (tmp_path / name).mkdir()
    file = tmp_path / "igpo.yaml"
    assert saved_options(str(tmp_path)) == saved_options(str(tmp_path / "checkpoint-5")) == file
    assert saved_options("a/model") is None and saved_options(str(tmp_path / "other")) is None
    assert saved_options("a/model", adapter=str(tmp_path)) == file

    settings = make_settings({"model": "m", "sources": ["x"], "indexes": ["i"], "k": 5}, file)
    assert (settings.k, settings.max_words) == (5, 40) and settings.system_prompt.startswith("You answer questions")
    assert settings.rollout["max_turns"] == 3 and settings.rollout["max_completion_length"] == 900
    assert settings.rollout["answer_template"] == training.answer_template
    output = ask("--config", file, QUESTION).output.replace("\n", "")
    assert f"options of {file}" in output and "2 passages of at most 40 words" in output


# ------------------------------------------------------------------------------------------------------ as it happens


def test_text_appears_token_by_token_and_is_what_igpo_eval_samples(files, tmp_path, monkeypatch):
    shown, update = [], Live.update

    def record(self, renderable, **options):
        console = Console(file=io.StringIO(), width=2000)
        console.print(renderable)
        shown.append(console.file.getvalue())
        return update(self, renderable, **options)

    monkeypatch.setattr(Live, "update", record)
    rollout = {"max_turns": 2, "max_completion_length": 24}
    settings = EvaluationSettings(str(files / "model"), ["x"], [str(files / "index")], rollout=rollout)
    asker = Asker(settings, Console(file=io.StringIO(), force_terminal=True), str(tmp_path))
    trajectory = asker.ask(QUESTION)
    (turn,) = trajectory.turns
    assert len(shown) == turn.num_tokens + 1 and turn.num_tokens > 3
    assert [f"  {i} tokens" in text for i, text in enumerate(shown, start=1)] == [True] * turn.num_tokens + [False]
    row = {"prompt": [{"role": "system", "content": asker.system_prompt}, {"role": "user", "content": QUESTION}]}
    del asker.trainer._generate_single_turn  # as it was
    (plain,) = asker.trainer.rollouts(
        [row | {"answers": ["-"], "dataset": "x", "id": "0", "sample": 0, "hops": None}], settings
    )
    assert json.loads(plain.to_json())["turns"] == json.loads(trajectory.to_json())["turns"]
