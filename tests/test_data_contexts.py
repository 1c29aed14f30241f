"""Corpora from the paragraphs that come with questions: published layouts, the join with questions, the command."""

import gzip
import json

import pytest
import question_layouts as layouts
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.data import build_corpus, load_questions
from igpo_trl.data.contexts import read_paragraphs
from igpo_trl.data.sets import find_context_source
from igpo_trl.evaluation import audit_questions
from igpo_trl.search import BM25Index
from igpo_trl.search.passages import read_passages


def read(path):
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as lines:
        return [json.loads(line) for line in lines]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["data", "corpus", *map(str, arguments)])


THREE = [("Dune (novel)", "It is a novel."), ("Frank Herbert", "Born in 1920."), ("Arrakis", "A planet.")]
LYNCH = [("Dune (1984 film)", "By David Lynch."), ("David Lynch", "Son of Edwina.")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (layouts.HOTPOTQA[0], THREE),
        (layouts.HOTPOTQA_FILE[0], THREE[:2]),
        (layouts.TWOWIKI[0], THREE),
        (layouts.TWOWIKI_FILE[0], LYNCH),
        (layouts.TWOWIKI_TEXT[0], LYNCH),
        (layouts.FLASHRAG["hotpotqa"][1][0], THREE),
        ({"metadata": json.dumps({"context": layouts.PAGES})}, THREE),
        ({"context": {"title": ["A"], "content": [["One.", "Two."]]}}, [("A", "One. Two.")]),  # FlashRAG's 2Wiki
        (layouts.MUSIQUE[0], [("Arrakis", "A planet."), ("Dune (novel)", "By Frank Herbert."), THREE[1]]),
        ({"context": "Dune is a novel.", "title": "Dune", "question": "…"}, [("Dune", "Dune is a novel.")]),  # SQuAD
        ({"positive_ctxs": [{"title": "A", "text": "a"}], "negative_ctxs": [{"title": "B", "text": "b"}]},
         [("A", "a"), ("B", "b")]),  # DPR
        ({"ctxs": [{"id": "1", "title": "A", "text": "a", "score": 1.0}]}, [("A", "a")]),
        # HotpotQA's sentences have their spaces, those of 2WikiMultihopQA have not.
        ({"context": [["A ", ["One.", " Two.", "Three."]], ["B", ["One.", "Two."]]]},
         [("A", "One. Two.Three."), ("B", "One. Two.")]),
        ({"context": [["A", []], ["B", [" "]]]}, []),
        ({"question": "Who?", "context": None}, []),
    ],
)  # fmt: skip
def test_layouts(record, expected):
    assert [(paragraph.title, paragraph.text) for paragraph in read_paragraphs(record)] == expected


@pytest.mark.parametrize(
    "context", [[["A"]], {"title": ["A", "B"], "sentences": [["x"]]}, {"title": ["A"]}, [{"title": "A"}], [["A", [1]]]]
)
def test_a_context_that_cannot_be_read_is_named(tmp_path, context):
    rows = [layouts.HOTPOTQA_FILE[0], {**layouts.HOTPOTQA_FILE[0], "_id": "2", "context": context}]
    out = write(tmp_path / "corpus.jsonl", [{"old": True}])
    with pytest.raises(ValueError, match=r"q.jsonl:2 \(row 1\): expected paragraphs .* in `context`, got"):
        build_corpus(write(tmp_path / "q.jsonl", rows), out)
    assert read(out) == [{"old": True}]  # the old file is there, and no part of a new one
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "q.jsonl"}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "hotpot.json").write_text(json.dumps(layouts.HOTPOTQA_FILE))
    write(tmp_path / "musique.jsonl", layouts.MUSIQUE)
    Dataset.from_list(layouts.TWOWIKI).to_parquet(tmp_path / "2wiki.parquet")
    return [tmp_path / name for name in ("hotpot.json", "musique.jsonl", "2wiki.parquet")]


def test_sets_are_merged_and_join_to_their_questions(files, tmp_path):
    counts = build_corpus(files, tmp_path / "corpus.jsonl.gz", tmp_path / "new/questions.jsonl")
    assert [count[1:] for count in counts] == [(1, 2, 2), (1, 3, 2), (2, 6, 0)]
    passages = read(tmp_path / "corpus.jsonl.gz")
    titles = {passage["id"]: (passage["title"], passage["text"]) for passage in passages}
    assert list(titles.values()) == [*THREE[:2], THREE[2], ("Dune (novel)", "By Frank Herbert.")]
    assert [passage.id for passage in read_passages(tmp_path / "corpus.jsonl.gz")] == list(titles)
    records = read(tmp_path / "new/questions.jsonl")
    assert [[titles[key] for key in record["supporting_ids"]] for record in records] == [
        THREE[:2],
        [("Dune (novel)", "By Frank Herbert."), THREE[1]],  # the paragraph that is marked, not all of this title
        [],  # none of these pages has a supporting title
        [],
    ]
    assert all({"context", "paragraphs"}.isdisjoint(record) for record in records)
    assert records[0]["level"] == "medium" and records[1]["question_decomposition"]
    rows = load_questions(tmp_path / "new/questions.jsonl", None)
    assert rows.to_list() == load_questions(files, None).to_list()
    index = BM25Index.build(tmp_path / "corpus.jsonl.gz", show_progress=False)
    assert [question.answerable for question in audit_questions(index, rows).questions] == [True, True, False, False]


def test_a_distractor_with_a_supporting_title_does_not_support(tmp_path):
    other = {"idx": 3, "title": "Frank Herbert", "paragraph_text": "A page of that name.", "is_supporting": False}
    row = layouts.MUSIQUE[0] | {"paragraphs": [*layouts.MUSIQUE[0]["paragraphs"], other]}
    build_corpus(write(tmp_path / "q.jsonl", [row]), tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl")
    ids = [passage["id"] for passage in read(tmp_path / "corpus.jsonl")]
    assert read(tmp_path / "questions.jsonl")[0]["supporting_ids"] == ids[1:3]


def test_ids_do_not_depend_on_order_or_company(files, tmp_path):
    build_corpus(files, tmp_path / "a.jsonl.gz")
    build_corpus(files[::-1], tmp_path / "b.jsonl")
    build_corpus(files, tmp_path / "c.jsonl.gz")
    assert {row["id"]: row for row in read(tmp_path / "a.jsonl.gz")} == {
        row["id"]: row for row in read(tmp_path / "b.jsonl")
    }
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "c.jsonl.gz").read_bytes()
    # A known id: a corpus that was built yesterday still fits.
    assert read(tmp_path / "a.jsonl.gz")[0]["id"] == "43c8265ff80b3c36"
    again = {**layouts.HOTPOTQA_FILE[0], "context": [["Dune  (novel)", ["It is", " a\nnovel. "]]]}
    build_corpus([write(tmp_path / "again.jsonl", [again]), files[0]], tmp_path / "d.jsonl")
    assert len(read(tmp_path / "d.jsonl")) == 2  # space makes no difference


def test_a_local_data_set_and_its_splits(tmp_path, run):
    rows = {"train": layouts.HOTPOTQA, "test": [layouts.HOTPOTQA[0] | {"answer": ""}]}
    DatasetDict({split: Dataset.from_list(of) for split, of in rows.items()}).save_to_disk(tmp_path / "set")
    result = run(f"{tmp_path}/set:train", "--out", tmp_path / "corpus.jsonl", "--questions", tmp_path / "q.jsonl")
    assert result.exit_code == 0, result.output
    assert "1 questions with 3 paragraphs, 3 of them new." in result.stdout
    assert f"igpo index --corpus {tmp_path / 'corpus.jsonl'}" in result.stdout
    assert len(read(tmp_path / "q.jsonl")[0]["supporting_ids"]) == 2
    # A split without answers has passages all the same, but no questions.
    assert run(f"{tmp_path}/set", "--split", "test", "--out", tmp_path / "test.jsonl").exit_code == 0
    result = run(f"{tmp_path}/set:test", "--out", tmp_path / "x.jsonl", "--questions", tmp_path / "y.jsonl")
    assert result.exit_code == 1 and "published without answers" in result.stderr
    assert not (tmp_path / "x.jsonl").exists() and not (tmp_path / "y.jsonl").exists()
    result = run(f"{tmp_path}/set", "--split", "dev", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 1 and "there is no split dev. Name one of train, test" in result.stderr


def test_a_limit_and_questions_marked_as_not_answerable(tmp_path, caplog):
    rows = [{"question": "Who?", "answers": ["A"], "context": [[f"Page {i}", ["Text."]]]} for i in range(5)]
    path = write(tmp_path / "q.jsonl", [{"answerable": False} | rows[0] | {"context": [["No", ["no."]]]}, *rows])
    (count,) = build_corpus(path, tmp_path / "c.jsonl", limit=3)
    assert (count.questions, count.passages) == (3, 3)
    build_corpus(path, tmp_path / "c.jsonl")
    assert [row["title"] for row in read(tmp_path / "c.jsonl")] == [f"Page {i}" for i in range(5)]
    assert "left out 1 questions that are marked as not answerable" in caplog.text


@pytest.mark.parametrize("name", ["nq", "popqa", "TriviaQA", "bamboogle:test"])
def test_sets_without_passages(run, tmp_path, name):
    result = run(name, "--out", tmp_path / "c.jsonl")
    assert result.exit_code == 1 and "Sets with passages: hotpotqa, 2wiki, musique." in result.stderr


def test_mistakes(run, tmp_path):
    plain = write(tmp_path / "plain.jsonl", [{"question": f"{i}?", "answers": ["x"]} for i in range(2000)])
    for arguments, message in (
        ([plain, "--out", tmp_path / "c.jsonl"], f"{plain}: no passages come with these questions"),
        ([plain, "--out", tmp_path / "c.txt"], "expected a file that ends in .jsonl or .jsonl.gz"),
        ([tmp_path / "absent.jsonl", "--out", tmp_path / "c.jsonl"], "no such file"),
        (["hotpoqa", "--out", tmp_path / "c.jsonl"], "Did you mean hotpotqa?"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0 and message in " ".join(result.stderr.split()), result.output
        assert [path.name for path in tmp_path.iterdir()] == ["plain.jsonl"]


def test_names_of_sets_and_splits():
    assert find_context_source("hotpotqa", "dev")[:3] == ("hotpotqa/hotpot_qa", False, "distractor")
    assert find_context_source("hotpot_qa:dev[:100]", "train").split == "validation[:100]"
    assert find_context_source("2wiki").split == "validation"
    assert find_context_source("musique", "train")[::4] == ("dgslibisey/MuSiQue", "train")
