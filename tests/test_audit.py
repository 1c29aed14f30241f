"""Which questions a corpus can answer: by hand, on real questions, from the command line, and before training."""

import gzip
import json
import logging
import math
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from igpo_trl.cli import train
from igpo_trl.cli.app import app
from igpo_trl.data import load_questions
from igpo_trl.evaluation import audit, audit_questions, check_answerable, has_answer
from igpo_trl.evaluation.scores import AnswerFinder
from igpo_trl.search import BM25Index, HybridIndex

PASSAGES = [
    {"id": "1", "title": "Dune (novel)", "text": "Dune is a novel by Frank Herbert."},
    {"id": "2", "title": "Frank Herbert", "text": "Herbert was born in Tacoma."},
    {"id": "3", "title": "Frank Herbert", "text": "He died in 1986."},
    {"id": "4", "title": "Oslo", "text": "Oslo lies in Norway."},
]


def asked(name, answers, titles=(), hops=2, dataset="mine", question=None):
    return {
        "id": name,
        "dataset": dataset,
        "hops": hops,
        "question": question or f"What is asked in {name}?",
        "answers": answers,
        "supporting_titles": list(titles),
        "level": f"level of {name}",
    }


QUESTIONS = [
    asked("whole", ["1986"], ["DUNE (novel) ", "Frank  Herbert"], question="In what year did Dune lose its writer?"),
    asked("yes", ["yes"], ["Oslo"], question="Does Oslo lie in Norway?"),
    asked("no title", ["Tacoma"], ["Frank Herbert", "Arrakis"]),
    asked("elsewhere", ["Norway"], ["Frank Herbert"]),
    asked("nowhere", ["Paris"], ["Oslo"], hops=1),
    asked("yes, no title", ["no"], ["Bergen"], hops=1),
    asked("untitled", ["Lyon", "Tacoma"], hops=None),
    asked("untitled, nowhere", ["Lyon"], hops=None),
    asked("untitled, yes", ["Yes"], hops=None),
]
ANSWERABLE = {"whole", "yes", "untitled"}
UNANSWERABLE = {
    "no title": "no passage is titled 'Arrakis'",
    "elsewhere": "no passage with the supporting titles contains an answer",
    "nowhere": "no passage with the supporting titles contains an answer",
    "yes, no title": "no passage is titled 'Bergen'",
    "untitled, nowhere": "no passage contains an answer",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def index():
    return BM25Index.build(PASSAGES, show_progress=False)


@pytest.fixture
def rows(tmp_path):
    return load_questions(write(tmp_path / "questions.jsonl", QUESTIONS), None)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: CliRunner().invoke(app, ["data", "audit", *map(str, arguments)])


words = st.lists(st.sampled_from(["New", "York", "the", "Élan", "elan", "1,000", "U.S.", "of", "?"]), max_size=6)


@given(words, st.lists(words, min_size=1, max_size=6))
def test_many_answers_are_found_as_one_is(text, answers):
    text, answers = " ".join(text), [" ".join(answer) for answer in answers]
    assert AnswerFinder(answers).find(text) == {answer for answer in answers if has_answer([text], [answer])}


def test_every_question_is_judged(index, rows):
    result = audit_questions(index, rows, k=2)
    assert {question.id for question in result.questions if question.answerable} == ANSWERABLE
    assert {question.id: question.reason for question in result.unanswerable} == UNANSWERABLE
    of = {question.id: question for question in result.questions}
    assert of["untitled, yes"].answerable is None and of["untitled, yes"].reason == ""
    assert (of["elsewhere"].answer, of["elsewhere"].answer_in_titles) == (True, False)
    assert (of["no title"].missing_titles, of["untitled"].missing_titles) == (["Arrakis"], None)
    assert (of["yes"].answer, of["yes"].titles) == (None, True)


def test_searches_with_the_question_and_with_the_titles(index, rows):
    whole, yes, *_ = audit_questions(index, rows, k=2).questions
    assert whole.titles_by_titles and whole.answer_by_titles
    assert not whole.answer_by_question and not whole.titles_by_question  # the question names Dune alone
    assert yes.titles_by_question and yes.answer_by_question is None
    of = {question.id: question for question in audit_questions(index, rows, k=2).questions}
    assert of["untitled"].answer_by_titles is None and of["untitled"].titles_by_question is None
    assert of["no title"].titles_by_titles is False and of["no title"].answer_by_titles
    (first, *_) = audit_questions(index, rows, k=None).questions
    assert first.answerable and first.answer_by_question is None


def test_shares_by_set_and_hops(index, rows):
    other = {**rows[0], "dataset": "other", "id": "other"}
    result = audit_questions(index, [*rows, other], k=2)
    shares = {(group["dataset"], group["hops"]): group for group in result.to_dict()["groups"]}
    assert list(shares) == [
        ("mine", "1"), ("mine", "2"), ("mine", "?"), ("mine", "all"), ("other", "2"), ("all", "all")
    ]  # fmt: skip
    assert shares["mine", "2"]["answerable"] == {"count": 2, "of": 4, "share": 0.5}
    assert shares["mine", "2"]["answer"] == {"count": 3, "of": 3, "share": 1.0}
    assert shares["mine", "?"]["titles"] == {"count": 0, "of": 0, "share": None}
    assert shares["mine", "all"]["questions"] == 9 and shares["all", "all"]["answerable"]["count"] == 4
    table = result.table()
    assert [row[:3] for row in table.rows] == [[*key, str(group["questions"])] for key, group in shares.items()]
    assert (
        "Answer in top 2, by titles" in table.header
        and dict(zip(table.header, table.rows[1], strict=True))["Answerable"] == "50.0"
    )
    unsearched = audit_questions(index, rows, k=None).table()
    assert not any("top" in heading for heading in unsearched.header)


class Server:
    """Answers searches, and does not show its passages, as a search server."""

    def __init__(self, index):
        self.search_batch = index.search_batch


def test_a_corpus_on_a_server_is_only_searched(index, rows, caplog):
    result = audit_questions(Server(index), rows, k=2)
    assert result.passages is None and not result.unanswerable
    assert {question.answerable for question in result.questions} == {None}
    assert result.questions[0].titles_by_titles
    assert math.isnan(check_answerable(Server(index), rows)) and not caplog.records
    # The passages of a hybrid index are those of a part, if one has them here.
    assert len(audit_questions(HybridIndex([Server(index), index]), rows, k=None).unanswerable) == len(UNANSWERABLE)
    assert audit_questions(HybridIndex([Server(index), Server(index)]), rows, k=None).passages is None


def test_without_questions(index):
    with pytest.raises(ValueError, match="no questions to audit"):
        audit_questions(index, [])


# ----------------------------------------------------------------------------------------------------- before training


def test_a_warning_before_training(index, rows, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert check_answerable(index, rows, command="igpo data audit x") == pytest.approx(5 / 8)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "5 of 8 sampled questions (62%) cannot be answered from the corpus, as 'What is asked in no title?': no "
        "passage is titled 'Arrakis'. `igpo data audit x` shows more"
    )
    caplog.clear()
    good = [row for row in rows if row["id"] in ANSWERABLE] * 100
    assert check_answerable(index, good, sample=200) == 0
    # One bad question in a hundred is no reason to stop.
    assert check_answerable(index, [*good[:99], rows[2]]) == pytest.approx(0.01)
    assert math.isnan(check_answerable(index, [row for row in rows if row["id"] == "untitled, yes"]))
    assert not caplog.records
    monkeypatch.setattr(audit, "LARGEST_CHECKED", len(PASSAGES))
    assert math.isnan(check_answerable(index, rows, command="igpo data audit x"))
    assert check_answerable(index, [row for row in rows if row["supporting_titles"]][:2]) == 0  # titles take less time
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "`igpo data audit x` does it" in record.getMessage()


def test_training_warns_with_a_command_that_works(tmp_path, monkeypatch, run, caplog):
    questions = write(tmp_path / "some questions.jsonl", QUESTIONS)
    corpus = write(tmp_path / "corpus.jsonl", PASSAGES)
    script = train.ScriptArguments(questions=str(questions), corpus=str(corpus), num_eval_questions=0)
    monkeypatch.setattr(train, "check_arguments", lambda *each: None)

    class Loaded(Exception):
        pass

    def load(**options):
        raise Loaded

    monkeypatch.setattr(train, "IGPOTrainer", load)
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "cache"))
    training = train.IGPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(Loaded):
        train.run_training(script, training, train.ModelConfig(model_name_or_path="absent"))
    (message,) = [record.getMessage() for record in caplog.records if "cannot be answered" in record.getMessage()]
    monkeypatch.chdir(tmp_path)
    words = shlex.split(message.split("`")[1])
    assert words[:4] == ["igpo", "data", "audit", str(questions)]
    result = run(*words[3:])
    assert result.exit_code == 0, result.output
    assert len(load_questions(tmp_path / "answerable.jsonl.gz")) == len(ANSWERABLE) + 1  # and one that is not judged
    script.index, script.corpus = "some/index", None
    assert "--index some/index" in train.audit_command(script)


# ---------------------------------------------------------------------------------------------------- the command line


def test_keep_loses_no_column(run, tmp_path):
    questions, corpus = write(tmp_path / "q.jsonl", QUESTIONS), write(tmp_path / "corpus.jsonl", PASSAGES)
    out = tmp_path / "new/answerable.jsonl.gz"
    result = run(questions, "--corpus", corpus, "--keep", "answerable", out, "--k", 2)
    assert result.exit_code == 0, result.output
    assert "Wrote 4 of 9 questions" in result.output and "1 yes-no questions without titles" in result.output
    assert "no title: What is asked in no title?  Tacoma\n    no passage is titled 'Arrakis'" in result.output
    before = {row["id"]: row for row in load_questions(questions, None)}
    kept = load_questions(out, None).to_list()
    assert {row["id"] for row in kept} == {*ANSWERABLE, "untitled, yes"}
    assert all(row == before[row["id"]] for row in kept)
    records = [json.loads(line) for line in gzip.open(out, "rt")]
    assert [record["level"] for record in records] == [f"level of {record['id']}" for record in records]
    bad = tmp_path / "bad.jsonl"
    assert run(questions, "--corpus", corpus, "--keep", "unanswerable", bad).exit_code == 0
    assert {row["id"] for row in load_questions(bad)} == set(UNANSWERABLE)


@pytest.mark.parametrize("layout", ["csv", "published"])
def test_kept_questions_of_other_layouts(run, tmp_path, layout):
    if layout == "csv":
        questions = tmp_path / "mine.csv"
        questions.write_text("question,answers,supporting_titles,note\nWho?,Tacoma | Oslo,Oslo,x\nWhy?,Rome,,y\n")
        expected = {"question": "Who?", "answers": ["Tacoma", "Oslo"], "supporting_titles": ["Oslo"], "note": "x"}
    else:
        facts = [["Dune (novel)", 0], ["Frank Herbert", 0]]
        context = [["Oslo", ["It is a city."]]]
        record = {"_id": "5" * 24, "question": "When?", "answer": "1986", "supporting_facts": facts, "level": "easy"}
        records = [record | {"context": context}, record | {"_id": "6" * 24, "answer": "1985"}]
        questions = tmp_path / "hotpot.json"
        questions.write_text(json.dumps(records))
        expected = {"id": f"hotpotqa_{'5' * 24}", "supporting_facts": facts, "context": context, "hops": 2}
    corpus = write(tmp_path / "corpus.jsonl", PASSAGES)
    result = run(questions, "--corpus", corpus, "--keep", "answerable", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert expected.items() <= record.items()
    (row,) = load_questions(tmp_path / "out.jsonl", None)
    assert row == next(each for each in load_questions(questions, None) if each["id"] == row["id"])


def test_json(run, tmp_path, index):
    index.save(tmp_path / "index")
    result = run(write(tmp_path / "q.jsonl", QUESTIONS), "--index", tmp_path / "index", "--json")
    record = json.loads(result.stdout)
    assert (record["passages"], record["k"]) == (4, 10)
    assert {each["id"]: each["reason"] for each in record["unanswerable"]} == UNANSWERABLE


def test_mistakes(run, tmp_path):
    questions, corpus = write(tmp_path / "q.jsonl", QUESTIONS), write(tmp_path / "corpus.jsonl", PASSAGES)
    for arguments, message in (
        ([questions], "either --index (an index of them) or --corpus"),
        ([questions, "--corpus", corpus, "--index", "x"], "either --index (an index of them) or --corpus"),
        ([questions, "--corpus", tmp_path / "absent.jsonl"], "absent.jsonl: no such file"),
        ([questions, "--index", tmp_path / "absent"], "no index in"),
        ([tmp_path / "absent.jsonl", "--corpus", corpus], "no such file"),
        (
            [questions, "--index", "http://127.0.0.1:9", "--keep", "answerable", "x"],
            "does not show its corpus",
        ),
        ([questions, "--corpus", corpus, "--keep", "answerable", "x"], "ends in .jsonl or .jsonl.gz"),
        ([questions, "--corpus", corpus, "--keep", "good", "x"], "'good' is not one of 'answerable', 'unanswerable'"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0 and message in " ".join(result.stderr.split()), result.output
    lost = write(tmp_path / "lost.jsonl", [asked("1", ["Rome"])])
    result = run(lost, "--corpus", corpus, "--keep", "answerable", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and "none of the 1 questions is answerable" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("questions", "corpus", "lowest", "highest"),
    [("hotpotqa", "hotpotqa", 0, 0.01), ("hotpotqa", "2wiki", 0.9, 1), ("popqa", "popqa", 0.1, 0.3)],
)
def test_real_questions(shared_dir, caplog, questions, corpus, lowest, highest):
    index = BM25Index.build(shared_dir / f"data/corpus/{corpus}.jsonl.gz", show_progress=False)
    caplog.clear()
    share = check_answerable(index, load_questions(shared_dir / f"data/questions/{questions}.jsonl.gz"))
    assert lowest <= share <= highest
    assert len(caplog.records) == (share > 0.02)
