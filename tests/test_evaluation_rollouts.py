"""`igpo eval` from the model to the table, killed and resumed, with real processes and a real index."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import typer
from test_tiny_model import world, write
from tiny import Scripted, answer, call, make_dataset, make_model, make_tokenizer, search
from typer.testing import CliRunner

from igpo_trl.beliefs import build_probes, score_beliefs
from igpo_trl.cli.app import app
from igpo_trl.cli.errors import one_line_errors
from igpo_trl.data import load_questions
from igpo_trl.evaluation import load_run
from igpo_trl.evaluation.rollouts import EvaluationTrainer, make_arguments, roll_out
from igpo_trl.evaluation.settings import EvaluationSettings, settings_of_training
from igpo_trl.rewards import make_answer_reward
from igpo_trl.search import BM25Index, SearchError
from igpo_trl.trajectory import key_of

ROLLOUT = {"max_turns": 3, "max_completion_length": 48}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of random weights, an index, questions."""
    folder = tmp_path_factory.mktemp("files")
    passages, questions = world()
    BM25Index.build(write(folder / "corpus.jsonl", passages), show_progress=False).save(folder / "index")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write(folder / "questions.jsonl", [question | {"dataset": "rivers"} for question in questions])
    return folder


def settings(files, **changed):
    given = {"model": files / "model", "sources": [files / "questions.jsonl"], "indexes": [files / "index"]}
    given = {name: [str(v) for v in value] if isinstance(value, list) else str(value) for name, value in given.items()}
    return EvaluationSettings(**{"system_prompt": "none", "rollout": dict(ROLLOUT), **given, **changed})


def command(files, out, *more):
    given = {
        "model": files / "model", "data": files / "questions.jsonl", "index": files / "index", "out": out,
        "max-turns": 3, "max-completion-length": 48, "system-prompt": "none",
    }  # fmt: skip
    return ["eval", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *map(str, more)]


def start(*words):
    """Starts a separate process."""
    source = os.path.join(os.path.dirname(__file__), "..", "src")
    path = os.pathsep.join([os.path.abspath(source), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_run_resumes_without_skipping_or_repeating_a_question(files, tmp_path):
    words = command(files, tmp_path / "run", "--batch-size", 2, "--num-samples", 4, "--temperature", 1.0)
    file = tmp_path / "run/trajectories/rank0.jsonl"
    process = start("-m", "igpo_trl", *words)
    try:
        deadline = time.monotonic() + 120
        while not (file.is_file() and file.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    before = file.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    if whole.count(b"\n") % 2 == 0:  # as if the kill had come between the two rollouts of a batch
        whole = whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
    assert 3 <= whole.count(b"\n") < 28, "the kill came too late to show anything"
    file.write_bytes(whole + b'{"prompt": "<|im_start|>us')  # an incomplete line, wherever the kill came

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(whole)
    keys = [key_of(trajectory) for trajectory in load_run(file)]
    assert len(keys) == len(set(keys)) == 28
    assert {key.sample for key in keys} == {0, 1, 2, 3} and len({key.id for key in keys}) == 7
    # The rollouts do not depend on the kill, because each batch has its own seed.
    fresh = roll_out(settings(files, num_samples=4, temperature=1.0), tmp_path / "fresh", batch_size=2)
    texts = {key_of(t): [turn.text for turn in t.turns] for t in fresh}
    assert texts == {key_of(t): [turn.text for turn in t.turns] for t in load_run(file)}
    assert len({str(text) for text in texts.values()}) > 20  # sampled, and not all with the same seed

    # A complete run prints its table without loading the model.
    (files / "model/model.safetensors").rename(files / "moved")
    try:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1 and "the weights have changed" in result.output
        (files / "moved").rename(files / "model/model.safetensors")
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0 and "Why rollouts ended" in result.output
        assert "rollouts:" not in result.output
    finally:
        if (files / "moved").exists():
            (files / "moved").rename(files / "model/model.safetensors")
    result = CliRunner().invoke(app, [*words, "--seed", "1", "--limit", "2"])
    assert result.exit_code == 1
    assert "limit was None, is 2; seed was 0, is 1; the questions have changed" in " ".join(result.output.split())


@pytest.mark.distributed
def test_two_processes_share_the_questions(files, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words = command(files, tmp_path / "run", "--batch-size", 2)
    process = start(*launcher, "-m", "igpo_trl", *words)
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.terminate()  # the launcher ends its processes
    assert process.returncode == 0, output[-3000:]
    assert output.count("Why rollouts ended") == 1
    of_rank = [load_run(tmp_path / f"run/trajectories/rank{rank}.jsonl") for rank in (0, 1)]
    assert [len(trajectories) for trajectories in of_rank] == [4, 3]
    alone = roll_out(settings(files), tmp_path / "alone", batch_size=7)
    together = {key_of(t): [turn.text for turn in t.turns] for t in load_run(tmp_path / "run")}
    assert together == {key_of(t): [turn.text for turn in t.turns] for t in alone}


class ScriptedEvaluation(Scripted, EvaluationTrainer):
    scripts = (
        [call("a"), call("b"), answer("City of Light")],
        [call("Rome"), answer("Paris Rome")],
        [call("a"), call("b"), call("c"), call("d")],
        [call("<answer>Paris</answer>") + call("x", "browse"), "I do not know."],
    )


def test_records_agree_with_the_trainer(files, tmp_path):
    wanted = settings(
        files, rollout={"max_turns": 4, "max_completion_length": 400, "answer_template": "<answer>{answer}</answer>"}
    )
    reward = make_answer_reward(format_penalty=0.0)
    seen = []

    def spy(completions, **columns):
        seen.extend(reward(completions, **columns))
        return seen[-len(completions) :]

    trainer = ScriptedEvaluation(
        model=make_model(),
        reward_funcs=spy,
        args=make_arguments(wanted, tmp_path, 4),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        tools=[search],
    )
    trainer.model.eval()
    rows = [
        {"prompt": row["prompt"], "answers": row["answers"], "dataset": "x", "id": str(i), "sample": 0, "hops": 2}
        for i, row in enumerate(make_dataset(4))
    ]
    trajectories = trainer.rollouts(rows, wanted)
    info = [trajectory.info for trajectory in trajectories]
    assert [row["prediction"] for row in info] == ["City of Light", "Paris Rome", None, None]
    assert [row["f1"] for row in info] == seen == pytest.approx([1, 2 / 3, 0, 0])
    assert [row["em"] for row in info] == [1, 0, 0, 0]
    assert [row["searches"] for row in info] == [2, 1, 3, 2]
    assert [row["failed_calls"] for row in info] == [0, 0, 0, 1]
    assert [trajectory.stop_reason for trajectory in trajectories] == [
        "answered",
        "answered",
        "turn_limit",
        "answered",
    ]
    assert [len(t.turns) for t in trajectories] == [3, 2, 4, 2]
    tokenizer = trainer._tokenizer
    for trajectory in trajectories:
        text = trajectory.prompt + "".join(turn.text + turn.observation for turn in trajectory.turns)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = tokenizer(trajectory.prompt, add_special_tokens=False)["input_ids"]
        sampled = sum(turn.num_tokens for turn in trajectory.turns)
        assert len(prompt) + sampled + trajectory.info["tokens_observed"] == len(tokens)
        # Beliefs are the model's own after each context.
        probes = build_probes(tokenizer, trajectory.answers, "<answer>{answer}</answer>")
        context = trajectory.prompt
        for turn in trajectory.turns:
            ids = tokenizer(context, add_special_tokens=False)["input_ids"]
            (scores,) = score_beliefs(trainer.model, [ids], [[len(ids)]], [probes], method="per_turn")
            assert turn.belief == pytest.approx(scores.max().exp().item(), rel=1e-4)
            context += turn.text + turn.observation
        gains = [b.belief - a.belief for a, b in zip(trajectory.turns, trajectory.turns[1:], strict=False)]
        assert [turn.info_gain for turn in trajectory.turns] == [*map(pytest.approx, gains), None]


def test_greedy_decoding_takes_the_most_likely_tokens(files, tmp_path):
    other = write(
        tmp_path / "other.jsonl",
        [{"question": "What is at the Seine?", "answers": "Paris", "id": 1, "dataset": "other"}],
    )
    BM25Index.build([{"id": "1", "title": "Paris", "text": "Seine"}], show_progress=False).save(tmp_path / "other")
    wanted = settings(
        files,
        sources=[str(files / "questions.jsonl"), str(other)],
        indexes=[str(files / "index"), str(tmp_path / "other")],
        limit=2,
    )
    trajectories = roll_out(wanted, tmp_path / "run", batch_size=3)
    assert [t.info["dataset"] for t in trajectories] == ["rivers", "rivers", "other"]
    model, tokenizer = make_model().eval(), make_tokenizer()
    for trajectory in trajectories:
        ids = tokenizer(trajectory.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        said = model.generate(ids, do_sample=False, max_new_tokens=48, eos_token_id=2, pad_token_id=0)
        assert trajectory.turns[0].text == tokenizer.decode(said[0, ids.shape[1] :])


def test_every_set_is_searched_in_its_own_index(files, tmp_path, monkeypatch):
    class Searching(Scripted, EvaluationTrainer):
        scripts = ([call("city"), answer("Paris")],)

    for name in ("Lyon", "Oslo"):
        write(
            tmp_path / f"{name}.jsonl", [{"question": f"Which {name}?", "answers": name, "id": "1", "dataset": name}]
        )
        passage = {"id": "1", "title": name, "text": "the city", "score": 0}
        BM25Index.build([passage], show_progress=False).save(tmp_path / name)
    monkeypatch.setattr("igpo_trl.evaluation.rollouts.EvaluationTrainer", Searching)
    rollout = {"max_turns": 3, "max_completion_length": 200}
    names = ["Oslo", "Lyon", "Oslo"]
    sources = [str(tmp_path / f"{name}.jsonl") for name in names[:2]]
    wanted = settings(files, sources=sources, indexes=[str(tmp_path / name) for name in names[:2]], rollout=rollout)
    trajectories = roll_out(wanted, tmp_path / "run", batch_size=8)
    assert [(t.info["dataset"], names[1] in t.turns[0].observation) for t in trajectories] == [
        ("Oslo", False),
        ("Lyon", True),
    ]
    assert [t.info["searches"] for t in trajectories] == [1, 1]


def test_rollouts_that_a_stop_tool_ends(files, tmp_path, monkeypatch, run):
    class Searching(Scripted, EvaluationTrainer):
        scripts = ([call("city"), call("Oslo", "final_answer").replace("query", "answer")],)

    monkeypatch.setattr("igpo_trl.evaluation.rollouts.EvaluationTrainer", Searching)
    words = command(files, tmp_path / "run", "--limit", 1, "--max-completion-length", 300)
    result = run(*words, "--stop-tools", "final_answer")
    assert result.exit_code == 0 and "stop_tool" in result.output, result.output
    (trajectory,) = load_run(tmp_path / "run")
    assert '"name": "final_answer"' in trajectory.prompt  # the policy knows of it
    assert (trajectory.info["prediction"], trajectory.info["searches"], len(trajectory.turns)) == ("Oslo", 1, 2)
    scores = json.loads((tmp_path / "run/results.json").read_text())["sets"]["rivers"]
    assert scores["metrics"]["answered"]["mean"] == 1.0


def test_a_failing_search_service_ends_the_run(files, tmp_path, monkeypatch, run):
    class Searching(Scripted, EvaluationTrainer):
        scripts = ([call("city", "browse"), answer("Paris")], [call("city"), answer("Paris")])

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr("igpo_trl.search.network.http_requests.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("igpo_trl.evaluation.rollouts.EvaluationTrainer", Searching)
    words = command(files, tmp_path / "run")
    words[words.index("--index") + 1] = f"http://127.0.0.1:{port}"
    words[words.index("--max-completion-length") + 1] = "300"
    result = run(*words)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert (
        "searches have failed (Error: search failed: " in result.output and "the same command again" in result.output
    )
    assert not (tmp_path / "run/trajectories").exists()


def test_an_adapter_can_be_given_as_adapter_or_as_model(files, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(
        make_model(), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    adapted.peft_config["default"].base_model_name_or_path = str(files / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    plain = roll_out(settings(files, limit=2), tmp_path / "plain")
    named = roll_out(settings(files, limit=2, adapter=str(tmp_path / "adapter")), tmp_path / "named")
    alone = roll_out(settings(files, limit=2, model=str(tmp_path / "adapter")), tmp_path / "alone")
    texts = [[[turn.text for turn in t.turns] for t in run] for run in (plain, named, alone)]
    assert texts[0] != texts[1] == texts[2]
    assert [t.turns[0].belief for t in plain] != [t.turns[0].belief for t in named]


def test_settings_of_a_training_configuration(repository):
    assert settings_of_training(repository / "configs/hotpotqa_cpu.yaml") == {
        "system_prompt": "Search, then answer inside <answer> and </answer>.",
        "k": 2,
        "max_words": 40,
        "rollout": {
            "answer_template": "<answer> {answer} </answer>",
            "max_completion_length": 1024,
            "max_tool_calling_iterations": 3,
        },
    }
    lora = settings_of_training(repository / "configs/qwen2.5-3b-lora.yaml")
    assert (lora["dtype"], lora["rollout"]["max_turns"]) == ("bfloat16", 5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "./absent"}, FileNotFoundError, "no such directory: ./absent"),
        ({"adapter": "/absent"}, FileNotFoundError, "no such directory: /absent"),
        ({"num_samples": 2}, ValueError, "at temperature 0 are all the same"),
        ({"k": 0}, ValueError, "`k` must be at least 1, got 0"),
        ({"indexes": ["a", "b"]}, ValueError, "1 sources of questions and 2 indexes"),
        ({"indexes": ["absent"]}, FileNotFoundError, "no index in absent"),
        ({"sources": ["absent.jsonl"]}, FileNotFoundError, "absent.jsonl"),
        ({"rollout": {"max_turns": 0}}, ValueError, "`max_turns` must be at least 1"),
        ({"rollout": {"stop_tools": ["submit"]}}, ValueError, "`stop_tools` names submit, expected final_answer"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(files, tmp_path, monkeypatch, changed, error, message):
    monkeypatch.setattr("igpo_trl.evaluation.rollouts.make_trainer", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(error, match=message):
        roll_out(settings(files, **changed), tmp_path / "run")
    assert not (tmp_path / "run/run.json").exists()


def test_a_run_that_failed_before_its_first_rollout_can_be_started_again(files, tmp_path, run):
    words = command(files, tmp_path / "run", "--limit", 2)
    for wrong in ("no-such-model", files / "index"):
        result = run(*words, "--model", wrong)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        assert (tmp_path / "run/run.json").exists()
    assert run(*words).exit_code == 0
    assert "model was" in run(*words, "--model", "no-such-model").output


def test_the_same_question_twice_is_refused(files, tmp_path):
    wanted = settings(files, sources=[str(files / "questions.jsonl")] * 2)
    with pytest.raises(ValueError, match="is in .* and in"):
        roll_out(wanted, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_retrieval_alone(run, files, tmp_path):
    result = run(
        "eval", "--retrieval-only", "--data", files / "questions.jsonl", "--index", files / "index",
        "--k", "1,4", "--out", tmp_path / "out", "--limit", 5,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (scores,) = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert (scores["dataset"], scores["questions"]) == ("rivers", 5)
    # The person named in the question has a passage; only that passage names the city with the answer.
    assert scores["recall"]["4"]["mean"] >= 0.5
    assert (tmp_path / "out/retrieval.md").read_text().startswith("## Retrieval\n\n| Set |")


def test_table_and_compare(run, files, tmp_path):
    for name, temperature in (("a", 0.0), ("b", 1.5)):
        roll_out(settings(files, temperature=temperature, limit=3), tmp_path / name)
    result = run("eval", "table", tmp_path / "a", tmp_path / "b", "--variant", "reference")
    assert result.exit_code == 0, result.output
    assert result.output.count("F1 and EM (reference)") == 2
    assert json.loads((tmp_path / "a/results.json").read_text())["sets"]["rivers"]["questions"] == 3
    result = run("eval", "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert "temperature: 0.0 (A), 1.5 (B)" in result.output
    assert "rivers: F1" in (tmp_path / "c/compare.md").read_text()
    comparison = json.loads((tmp_path / "c/compare.json").read_text())
    assert comparison["sets"]["rivers"]["f1"]["questions"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "a"], "give the questions with --data and what to search with --index"),
        (["--data", "a", "--index", "b"], "give --model and --out"),
        (["--data", "a", "--index", "b", "--retrieval-only", "--k", "five"], "expected numbers"),
        (["--data", "a", "--index", "b", "--model", "m", "--out", "o", "--k", "3,5"], "expected one number"),
        (["--retrieval-only", "--data", "absent.jsonl", "--index", "absent"], "no index in absent"),
        (["--limit", "3", "table", "."], "--limit belongs to `igpo eval` without a command"),
        (["table", "."], "no rollouts in ."),
        (["compare", ".", "."], "no rollouts in ."),
        (["--data", "a", "--index", "b", "--model", "m", "--out", "o", "--judge-url", "u"], "needs both"),
        (["--data", "a", "--index", "b", "--model", "./m", "--out", "o"], "no such directory: ./m"),
        (
            ["--data", "a", "--index", "b", "--model", "m", "--out", "o", "--variant", "em"],
            "'em' is not one of 'squad', 'reference'",
        ),
    ],
)
def test_bad_input_gives_one_error_without_a_traceback(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = run("eval", *words)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.replace("│", " ").split())
    assert isinstance(result.exception, SystemExit)


def test_errors_that_the_user_can_fix_take_one_line(capsys):
    for error in (ValueError("two\n lines"), OSError("two lines"), ImportError("two lines"), SearchError("two lines")):
        with pytest.raises(SystemExit) as caught, one_line_errors():
            raise error
        assert (caught.value.code, capsys.readouterr().err) == (1, "Error: two lines\n")
    with pytest.raises(typer.BadParameter, match="two lines"), one_line_errors(OSError, param_hint="--model"):
        raise FileNotFoundError("two\nlines")
    bugs = [(KeyError("a bug"), ()), (ValueError("a bug"), (OSError,)), (SearchError("a bug"), (OSError,))]
    for error, kinds in bugs:
        with pytest.raises(type(error), match="a bug"), one_line_errors(*kinds):
            raise error


def test_help_of_all_commands(run):
    for words in ([], ["table"], ["compare"], ["judge"]):
        result = run("eval", *words, "--help")
        assert result.exit_code == 0 and "Usage" in result.output
    result = run("eval")
    assert result.exit_code == 2 and "--retrieval-only" in result.output


def test_questions_are_the_loaded_ones(files):
    """The digest of a run covers the result of `load_questions`."""
    assert load_questions(files / "questions.jsonl").num_rows == 7
