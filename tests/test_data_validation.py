"""Checks of questions before training, system prompts, and the commands `igpo data show` and `igpo data check`."""

import json
import logging
import subprocess
import sys

import pytest
import tiny
from datasets import Dataset
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.data import (
    NO_THINK_SYSTEM_PROMPT,
    THINK_SYSTEM_PROMPT,
    check_questions,
    load_questions,
    resolve_system_prompt,
)


def questions(*pairs) -> Dataset:
    """A data set of pairs `(question, answers)` with the ids q0, q1, …"""
    rows = [
        {"prompt": [{"role": "system", "content": "?"}, {"role": "user", "content": text}], "answers": answers}
        for text, answers in pairs
    ]
    return Dataset.from_list([row | {"id": f"q{i}"} for i, row in enumerate(rows)])


CLEAN = questions(("Who wrote Dune?", ["Frank Herbert"]), ("When?", ["1965", "in 1965"]))


def counts(report):
    return {(finding.split, finding.message): finding.count for finding in report.findings}


def test_clean_questions_have_no_findings(caplog):
    report = check_questions(CLEAN, {"dev": questions(("Where?", ["Tacoma"]))})
    assert not report
    assert report.sizes == {"train": 2, "eval[dev]": 1}
    assert str(report) == "Questions: train 2, eval[dev] 1."
    assert not caplog.records


def test_answers_that_equal_the_question():
    report = check_questions(questions(("Frank  Herbert?", ["x", "frank herbert"]), ("Frank Herbert?", ["Frank"])))
    assert counts(report)["train", "answers that equal the question"] == 1
    assert report.findings[0].examples == ("q0 'Frank  Herbert?'",)
    # Text that is only punctuation is compared unchanged.
    assert not check_questions(questions(("!?", ["?"])))


def test_repetitions_within_and_across_splits(caplog):
    train = questions(
        ("Who wrote Dune?", ["a"]), ("who wrote “Dune” ?", ["b"]), ("WHO WROTE DUNE", ["c"]), ("X", ["d"])
    )
    dev = questions(("who wrote dune", ["a"]), ("Who wrote Dune 2?", ["a"]), ("x!", ["a"]))
    with caplog.at_level(logging.WARNING):
        report = check_questions(train, {"dev": dev, "other": questions(("Why?", ["a"]), ("why", ["b"]))})
    assert counts(report) == {
        ("train", "repeated questions"): 2,
        ("eval[dev]", "questions that are also trained on"): 2,
        ("eval[other]", "repeated questions"): 1,
    }
    assert report.findings[1].examples == ("q0 'who wrote dune'", "q2 'x!'")
    assert len(caplog.records) == 3  # one per finding, not per question
    assert "eval[dev]: 2 questions that are also trained on, as q0 'who wrote dune'; q2 'x!'." in caplog.text
    assert len(str(report).splitlines()) == 4


def test_one_evaluation_set_and_few_examples(caplog):
    train = questions(*((f"Question {i}?", ["a"]) for i in range(10)))
    report = check_questions(train, train, examples=2, warn=False)
    assert counts(report) == {("eval", "questions that are also trained on"): 10}
    assert len(report.findings[0].examples) == 2
    assert not caplog.records


def test_long_answers_in_words_or_tokens():
    # Only the gold answer is measured; an alias may have any length.
    rows = questions(("a", ["w " * 32]), ("b", ["w " * 33]), ("c", ["w", "w " * 99]))
    assert counts(check_questions(rows)) == {("train", "gold answers of more than 32 words"): 1}
    assert counts(check_questions(rows, max_answer_length=31)) == {("train", "gold answers of more than 31 words"): 2}
    tokenizer = tiny.make_tokenizer()
    text = "Frank Herbert"
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert 1 < length
    rows = questions(("a", [text]))
    assert not check_questions(rows, tokenizer=tokenizer, max_answer_length=length)
    report = check_questions(rows, tokenizer=tokenizer, max_answer_length=length - 1)
    assert counts(report) == {("train", f"gold answers of more than {length - 1} tokens"): 1}


def test_unusable_answers_are_errors():
    with pytest.raises(ValueError, match=r"train, row 1: `answers` is \[\]"):
        check_questions(questions(("a", ["x"]), ("b", [])))
    with pytest.raises(ValueError, match=r"eval\[dev\], row 0: `answers` is \['x', ' '\]"):
        check_questions(CLEAN, {"dev": questions(("a", ["x", " "]))})
    with pytest.raises(ValueError, match=r"eval: no column \['answers'\]"):
        check_questions(CLEAN, CLEAN.remove_columns("answers"))


def test_other_columns():
    rows = Dataset.from_list([{"prompt": "Who?", "golden": "Ada"}, {"prompt": "who", "golden": "Ada"}])
    report = check_questions(rows, answer_column="golden")
    assert report.findings[0].examples == ("1 'who'",)


def test_overlap_of_real_files(shared_dir):
    """The expected number is counted here, by comparing questions in lower case."""
    folder = shared_dir / "data" / "questions"
    train, dev = (load_questions(folder / f"{name}.jsonl.gz") for name in ("plain_extra", "popqa"))
    report = check_questions(train, {"popqa": dev}, warn=False)
    texts = {row["prompt"][-1]["content"].lower() for row in train}
    shared = sum(row["prompt"][-1]["content"].lower() in texts for row in dev)
    assert shared > 0
    assert counts(report)["eval[popqa]", "questions that are also trained on"] == shared


# --- system prompts --------------------------------------------------------------------------------------------------


def test_system_prompts_by_name_file_and_text(tmp_path):
    assert resolve_system_prompt("think") == THINK_SYSTEM_PROMPT
    assert resolve_system_prompt("no_think") == NO_THINK_SYSTEM_PROMPT
    assert resolve_system_prompt("none") is resolve_system_prompt(None) is None
    assert resolve_system_prompt(THINK_SYSTEM_PROMPT) == THINK_SYSTEM_PROMPT
    assert resolve_system_prompt("Answer briefly.") == "Answer briefly."
    path = tmp_path / "mine.txt"
    path.write_text("Search, then answer: é.\n", encoding="utf-8")
    assert resolve_system_prompt(path) == resolve_system_prompt(str(path)) == "Search, then answer: é."
    bare = tmp_path / "no ending"
    bare.write_text("x")
    assert resolve_system_prompt(str(bare)) == "x"
    for text in ("a " * 5000, "é" * 200, "null \0 byte"):  # not valid as file names
        assert resolve_system_prompt(text) == text.strip()


def test_unusable_system_prompts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file of a system prompt: prompts/mine\.txt"):
        resolve_system_prompt("prompts/mine.txt")
    with pytest.raises(FileNotFoundError, match="think, no_think, none"):
        resolve_system_prompt(tmp_path / "mine")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        resolve_system_prompt(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="is empty"):
        resolve_system_prompt("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        resolve_system_prompt(tmp_path / "latin.txt")


def test_questions_take_a_prompt_by_name_or_file(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "x", "answers": ["a"]}))
    (tmp_path / "mine.txt").write_text("Mine.")
    assert load_questions(tmp_path / "q.jsonl", tmp_path / "mine.txt")[0]["prompt"][0]["content"] == "Mine."
    assert len(load_questions(tmp_path / "q.jsonl", "none")[0]["prompt"]) == 1


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    def write(name, *pairs):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"question": q, "answers": a}) + "\n" for q, a in pairs))
        return path

    return write


def test_show(run, files, tmp_path):
    toy = files("toy.jsonl", ("Who wrote [bold]Dune?", ["Frank Herbert", "Herbert"]), ("When?", ["1965"]))
    other = files("other.jsonl", ("Why?", ["w " * 40]))
    hops = tmp_path / "hops.jsonl"
    hops.write_text(json.dumps({"question": "x", "answers": ["a"], "hops": 2, "supporting_titles": ["Dune"]}))
    result = run("show", toy, other, hops, "--samples", 1)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert ["toy", "2", "?: 2", "1.5", "1.5", "2", "0"] in rows
    assert ["other", "1", "?: 1", "1.0", "40", "40", "0"] in rows
    assert ["hops", "1", "2: 1", "1.0", "1", "1", "1"] in rows
    assert "Who wrote [bold]Dune?" in result.output  # no markup
    assert "Frank Herbert" in result.output and "also: Herbert" in result.output
    assert "When?" not in result.output
    assert "Who wrote" not in run("show", toy, "--samples", 0).output
    assert "When?" not in run("show", toy, "--limit", 1).output


@pytest.mark.parametrize("source", ["absent.jsonl", "hotpotq", "owner/name"])
def test_show_says_what_is_wrong_with_a_source(run, source):
    result = run("show", source)
    assert result.exit_code == 2
    assert "Invalid value for SOURCE" in result.output
    assert isinstance(result.exception, SystemExit)


def test_check(run, files):
    train = files("train.jsonl", ("Who?", ["Ada"]), ("who", ["Ada"]), ("a [b]", ["a [b]"]))
    dev = files("dev.jsonl", ("WHO", ["Ada"]))
    result = run("check", train, dev)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "1 answers that equal the question in train" in text
    assert "1 repeated questions in train" in text
    assert "1 questions that are also trained on in eval[" in text
    assert "a [b]" in text
    assert run("check", train, dev, "--strict").exit_code == 1
    clean = run("check", dev, "--strict")
    assert clean.exit_code == 0 and "No findings" in clean.output
    missing = run("check", train, dev, "--tokenizer", "/nowhere/at/all")
    assert missing.exit_code == 2 and "no tokenizer" in missing.output


def test_check_measures_in_tokens(run, files, tmp_path):
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    train = files("train.jsonl", ("Who?", ["Ada Lovelace of London"]))
    result = run("check", train, "--tokenizer", tmp_path / "model", "--max-answer-length", 2)
    assert "gold answers of more than 2 tokens" in " ".join(result.output.split())
    assert "No findings" in run("check", train, "--max-answer-length", 4).output


def test_help_of_the_family_loads_nothing_heavy():
    code = (
        "import sys\nfrom igpo_trl.cli.app import app\n"
        "try:\n    app(['data', 'check', '--help'])\nexcept SystemExit: pass\n"
        "print(*sorted({'datasets', 'torch', 'transformers', 'evaluate'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    assert result.stderr.split() == []
