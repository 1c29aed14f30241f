"""Files of neighbouring projects: read right, or refused with the row and the reason."""

import csv
import json
from decimal import Decimal

import numpy
import pandas
import pytest
from datasets import Dataset
from test_data_layouts import write

from igpo_trl.data import load_questions
from igpo_trl.data.cells import as_text, as_texts

INSTRUCTION = (
    "Reason inside <think> and </think>. To look something up, write <tool_call> words </tool_call>; the pages arrive "
    "inside <tool_response> and </tool_response>. Finish with <answer> and </answer>, as in <answer> Rome </answer>. "
    "Question: "
)
QUESTION, TARGETS = "who wrote dune?", ["Frank Herbert", "Herbert"]


def verl_row(index=0, source="nq", **columns):
    """As verl's script makes it of Search-R1's files."""
    truth = {"target": TARGETS}
    return {
        "data_source": f"searchR1_{source}",
        "prompt": [
            {"role": "system", "content": "You are a helpful and harmless assistant."},
            {"role": "user", "content": INSTRUCTION + QUESTION},
        ],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {
            "index": index,
            "need_tools_kwargs": True,
            "question": QUESTION,
            "split": "train",
            "tools_kwargs": {"search": {"create_kwargs": {"ground_truth": truth, "question": QUESTION}}},
        },
        "metadata": None,
    } | columns


def search_r1_row(**columns):
    return {
        "id": "train_0",
        "question": QUESTION,
        "golden_answers": TARGETS,
        "data_source": "nq",
        "prompt": [{"role": "user", "content": INSTRUCTION + QUESTION + "\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": TARGETS}, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        "metadata": None,
    } | columns


def as_json_text(row, *columns):
    return row | {column: json.dumps(row[column]) for column in columns}


def without(row, *columns):
    return {column: value for column, value in row.items() if column not in columns}


KILT = {
    "id": "-123",
    "input": QUESTION,
    "output": [
        {"answer": "Frank Herbert", "provenance": [{"wikipedia_id": "1", "title": "Dune (novel)"}]},
        {"answer": "Herbert", "provenance": [{"wikipedia_id": "2", "title": "Frank Herbert"}]},
        {"provenance": [{"wikipedia_id": "3", "title": "Arrakis"}]},
        {"answer": ""},
    ],
    "meta": {"partial_evidence": []},
}
SQUAD = {"id": "5733be28", "title": "Dune", "context": "…", "question": QUESTION}


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        verl_row(),
        as_json_text(verl_row(), "prompt", "extra_info"),
        as_json_text(verl_row(), "reward_model"),
        verl_row(reward_model={"ground_truth": json.dumps({"target": TARGETS}), "style": "rule"}),
        verl_row(reward_model={"ground_truth": json.dumps(TARGETS), "style": "rule"}),
        verl_row(reward_model={"ground_truth": repr(TARGETS), "style": "rule"}),
        verl_row(reward_model={"ground_truth": "Frank Herbert<|answer_split|>Herbert", "style": "rule"}),
        verl_row(extra_info={"index": 0, "split": "train"}),  # the question follows the instruction
        as_json_text(verl_row(extra_info=None), "prompt"),
        without(verl_row(), "prompt"),
        without(verl_row(), "reward_model") | {"reward_spec": {"method": "rule", "ground_truth": {"target": TARGETS}}},
        search_r1_row(),
        as_json_text(search_r1_row(), "golden_answers"),
        search_r1_row(golden_answers=repr(TARGETS)),
        without(search_r1_row(), "golden_answers"),
        without(search_r1_row(), "golden_answers", "question"),
        {"data_source": "nq", "prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]}
        | {"reward_model": {"ground_truth": TARGETS}},
        {"dataset": "nq", "question": QUESTION, "answers": json.dumps(TARGETS)},
        {"dataset": "nq", "question": QUESTION, "answers": {"text": TARGETS, "answer_start": [1, 5]}},
        {"dataset": "nq", "prompt": [{"role": "user", "content": QUESTION}], "answers": json.dumps(TARGETS)},
        as_json_text(
            {"dataset": "nq", "prompt": [{"role": "user", "content": QUESTION}], "answers": TARGETS}, "prompt"
        ),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_question_and_the_targets_are_read(tmp_path, row, ending):
    (loaded,) = load_questions(write(tmp_path / f"mine.{ending}", [row]), None)
    assert loaded["prompt"] == [{"role": "user", "content": QUESTION}]
    assert loaded["answers"] == TARGETS
    assert loaded["dataset"] == "nq"


def test_numbers_of_rows_are_no_ids(tmp_path):
    """verl counts the rows of every file from 0: the ids of several files differ all the same."""
    paths = [
        write(tmp_path / name, [verl_row(0), verl_row(1, "hotpotqa")])
        for name in ("train.parquet", "test.parquet", "a/data/train.parquet", "b/data/train.parquet")
    ]
    ids = load_questions(paths)["id"][:]
    folder = tmp_path.name
    assert ids[:4] == [f"{folder}-train-0", f"{folder}-train-1", f"{folder}-test-0", f"{folder}-test-1"]
    assert ids[4:] == ["data-train-0", "data-train-1", "b-data-train-0", "b-data-train-1"]
    digits = [write(tmp_path / f"{i}.jsonl", [verl_row(extra_info={"index": "7"})]) for i in "ab"]
    assert load_questions(digits)["id"][:] == ["a-0", "b-0"]
    splits = [
        write(tmp_path / f"{source}.jsonl", [verl_row(source=source, extra_info={"index": "train_0"})])
        for source in ("nq", "hotpotqa")
    ]
    assert load_questions(splits)["id"][:] == ["nq_train_0", "hotpotqa_train_0"]
    with pytest.raises(ValueError, match="Ids must be unique"):
        load_questions([paths[0], paths[0]])


def test_files_without_ids_and_of_one_name_go_together(tmp_path):
    rows = [{"question": "x", "answers": ["a"]}]
    paths = [write(tmp_path / folder / "nq.jsonl", rows) for folder in ("train", "test")]
    assert load_questions(paths)["id"][:] == ["nq-0", "test-nq-0"]


def test_hops_and_titles_of_verls_files(tmp_path):
    facts = {"title": ["Dune (novel)", "Frank Herbert"], "sent_id": [0, 0]}
    metadata = {"type": "bridge", "level": "easy", "supporting_facts": facts}
    path = write(tmp_path / "train.parquet", [verl_row(source="hotpotqa", metadata=metadata)])
    (loaded,) = load_questions(path)
    assert (loaded["dataset"], loaded["hops"], loaded["supporting_titles"]) == ("hotpotqa", 2, facts["title"])


@pytest.mark.parametrize("name", ["nq-test.csv", "nq-test.qa.csv", "nq-test.tsv"])
def test_dprs_questions_have_tabs_and_no_header(tmp_path, name):
    path = tmp_path / name
    path.write_text(
        "who wrote dune?\t['Frank Herbert', 'Herbert']\n"
        'who said "fear, the mind killer"\t["Paul O\'Atreides"]\n'
        "\"dune\" is by whom\t['Frank Herbert']\n"
        'three words\t"[\'a\', \'b ""c""\']"\n'
        '"no, and yes"\t["[sic]"]\n'
    )
    loaded = load_questions(path, None)
    assert [row["prompt"][0]["content"] for row in loaded] == [
        "who wrote dune?",
        'who said "fear, the mind killer"',
        '"dune" is by whom',
        "three words",
        "no, and yes",
    ]
    assert loaded["answers"][:] == [TARGETS, ["Paul O'Atreides"], ["Frank Herbert"], ["a", 'b "c"'], ["[sic]"]]
    assert (loaded["dataset"][0], loaded["id"][0]) == ("nq-test", "nq-test-0")


def test_dprs_questions_as_written_by_csv(tmp_path):
    with open(tmp_path / "q.csv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([[QUESTION, TARGETS], ['"x"', ['a "b"', "it's"]]])
    loaded = load_questions(tmp_path / "q.csv", None)
    assert loaded["answers"][:] == [TARGETS, ['a "b"', "it's"]]
    assert loaded[1]["prompt"][0]["content"] == '"x"'


@pytest.mark.parametrize("row", [KILT, as_json_text(KILT, "output")])
def test_kilt(tmp_path, row):
    (loaded,) = load_questions(write(tmp_path / "nq-dev-kilt.jsonl", [row]), None)
    assert loaded == {
        "prompt": [{"role": "user", "content": QUESTION}],
        "answers": TARGETS,
        "dataset": "nq",
        "id": "nq_-123",
        "hops": 1,
        "supporting_titles": ["Dune (novel)"],  # the other pages are alternatives
    }


def test_kilt_without_answers_is_refused(tmp_path):
    for output in ([], [{"provenance": [{"title": "Dune"}]}]):
        with pytest.raises(ValueError, match=r"kilt\.jsonl:1 \(row 0\): `answers` is \[\]"):
            load_questions(write(tmp_path / "nq-test-kilt.jsonl", [KILT | {"output": output}]))


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Frank Herbert", "Herbert", "Herbert"], "answer_start": [1, 2, 3]},
        [{"text": "Frank Herbert", "answer_start": 1}, {"text": "Herbert", "answer_start": 2}],
        "{'text': ['Frank Herbert', 'Herbert'], 'answer_start': [1, 2]}",
    ],
)
def test_squad_style_answers(tmp_path, answers):
    for name in ("squad.parquet", "squad.jsonl"):
        (loaded,) = load_questions(write(tmp_path / name, [SQUAD | {"answers": answers}]), None)
        assert list(dict.fromkeys(loaded["answers"])) == TARGETS
        assert loaded["id"] == "5733be28"


def test_lists_that_pandas_has_printed(tmp_path):
    """`DataFrame.to_csv` prints an array without commas, which Python would read as one text."""
    frame = pandas.DataFrame({"question": [QUESTION], "answers": [numpy.array(TARGETS, dtype=object)]})
    frame.to_csv(tmp_path / "q.csv", index=False)
    assert "'Frank Herbert' 'Herbert'" in (tmp_path / "q.csv").read_text()
    assert load_questions(tmp_path / "q.csv")["answers"][:] == [TARGETS]
    saved = Dataset.from_list([{"question": QUESTION, "golden_answers": TARGETS}])
    saved.to_csv(tmp_path / "saved.csv")
    assert load_questions(tmp_path / "saved.csv")["answers"][:] == [TARGETS]


# --- names of sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mine.csv", {"Question": QUESTION, "Answer": "a"}),
        ("mine.jsonl", {"Question": QUESTION, "Answer": ["a", "b"]}),
        ("mine.tsv", {"id": 1, "question": QUESTION, "possible_answers": '["a"]'}),
        ("mine.jsonl", {"question": QUESTION, "answer": "a", "answer_aliases": ["b"]}),
        ("mine.jsonl", {"question": QUESTION, "answer": {"value": "a", "aliases": ["b"]}}),
        ("mine.jsonl", {"question": QUESTION, "answer": "a", "supporting_facts": [["T", 0]]}),
    ],
)
def test_columns_that_many_tables_have_name_no_set(tmp_path, name, row):
    (loaded,) = load_questions(write(tmp_path / name, [row]), None)
    assert (loaded["dataset"], loaded["hops"]) == ("mine", None)
    assert loaded["answers"][0] == "a"
    assert loaded["prompt"][0]["content"] == QUESTION


@pytest.mark.parametrize("name", ["bamboogle.csv", "Bamboogle Prerelease - Sheet1.csv", "bamboogle/test.csv"])
def test_bamboogle_is_told_by_its_name(tmp_path, name):
    (loaded,) = load_questions(write(tmp_path / name, [{"Question": QUESTION, "Answer": "a"}]))
    assert (loaded["dataset"], loaded["hops"]) == ("bamboogle", 2)


# --- numbers and other values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (False, "no"), (7, "7"), (7.0, "7"), (-0.0, "0"), (3.14, "3.14"), (1965, "1965"), (1e6, "1000000")]
    + [(Decimal("7.0"), "7"), (Decimal("1.25"), "1.25"), ("7.0", "7.0"), ("True", "True"), (0.00001, "0.00001")],
)
def test_a_value_as_a_person_would_write_it(tmp_path, value, text):
    assert as_text(value) == text
    for row in (
        {"question": QUESTION, "answer": value},
        {"question": QUESTION, "golden_answers": [value]},
        {"Question": QUESTION, "Answer": value},
        {"prompt": QUESTION, "reward_model": {"ground_truth": value}},
        {"question": QUESTION, "possible_answers": [value]},
        {"question": QUESTION, "answer": "x", "answer_aliases": [value]},
    ):
        for name in ("q.parquet", *(["q.jsonl"] if not isinstance(value, Decimal) else [])):
            assert load_questions(write(tmp_path / name, [row]))["answers"][0][-1] == text


@pytest.mark.parametrize(
    "value",
    [0.1 + 0.2, float("inf"), 1e22, b"x", None, ["a"], {"spans": ["a"]}, pandas.Timestamp("1965-08-01").date()],
)
def test_what_nobody_would_write_is_an_error_with_the_row(tmp_path, value):
    rows = [{"question": QUESTION, "golden_answers": ["a", "b"]}]
    with pytest.raises(ValueError, match=r"q\.jsonl:1 \(row 0\): `golden_answers` got .*expected a text"):
        path = write(tmp_path / "q.jsonl", rows)
        path.write_text(path.read_text().replace('"b"', "null"))
        load_questions(path)
    with pytest.raises(ValueError, match="expected a text"):
        as_texts(["a", value])
    if not isinstance(value, list | dict) and value is not None:
        with pytest.raises(ValueError, match=r"q\.parquet \(row 0\): `answer` got .*expected a text"):
            load_questions(write(tmp_path / "q.parquet", [{"question": QUESTION, "answer": value}]))


def test_numbers_that_pandas_turned_into_floats(tmp_path):
    frame = pandas.DataFrame({"question": ["x", "y"], "answers": [["a"], ["b"]], "id": [7, None], "hops": [2, None]})
    assert frame["id"].dtype == float
    frame.to_json(tmp_path / "q.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "q.parquet")
    frame.drop(columns="id").to_csv(tmp_path / "q.csv", index=False)
    for name in ("q.parquet", "q.jsonl", "q.csv"):
        loaded = load_questions(tmp_path / name)
        assert loaded["id"][:] == ["q-0" if name == "q.csv" else "7", "q-1"]
        assert loaded["hops"][:] == [2, None]
    missing = pandas.DataFrame({"question": ["x", "y"], "answer": [7.0, float("nan")]})
    missing.to_parquet(tmp_path / "missing.parquet")
    with pytest.raises(ValueError, match=r"\(row 1\): `answers` is \[\]"):
        load_questions(tmp_path / "missing.parquet")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            verl_row(extra_info=None, prompt=[{"role": "user", "content": "Call <search> q </search>. Who?"}]),
            r"`prompt` explains another format of calls \(</search>\).*Give the question a column `question`",
        ),
        (verl_row(extra_info=None, prompt="<|im_start|>user\nWho?<|im_end|>\n"), "another format of calls"),
        (
            verl_row(
                extra_info=None,
                prompt=[{"role": role, "content": "x"} for role in ("user", "assistant", "user")],
            ),
            r"expected `prompt` to be chat messages that end with the only one of the user",
        ),
        (verl_row(extra_info=None, prompt=[{"role": "user", "content": [{"type": "image"}]}]), "list of parts"),
        (verl_row(reward_model={"style": "rule"}), r"to hold `ground_truth`"),
        (verl_row(reward_model={"ground_truth": {"gold": "x"}}), r"`ground_truth` got \{'gold': 'x'\}"),
        (verl_row(reward_model={"ground_truth": "['a' 'b' ... 'c']"}), r"`ground_truth` is not a JSON list"),
        ({"question": QUESTION, "answers": "array(['a'], dtype=object)"}, r"`answers` is a printed array"),
        ({"question": QUESTION, "answer": "['a', "}, None),
        ({"question": QUESTION, "answer": 2, "choices": ["a", "b", "c"]}, r"multiple-choice question is \['2'\]"),
        ({"question": QUESTION, "golden_answers": ["B"], "choices": ["a", "b"]}, "multiple-choice"),
        ({"_id": "q1", "text": QUESTION, "metadata": {}}, r"no column `question`; got \['_id', 'metadata', 'text'\]"),
        ({"instruction": QUESTION, "input": "", "output": "a"}, r"no column `question`"),
        ({"title": "Dune", "paragraphs": [{"qas": []}]}, r"no column `question`; got \['paragraphs', 'title'\]"),
        ({"query": QUESTION, "answers": {"en": ["a"]}}, r"no column `question`"),
        ({"question": QUESTION, "answers": {"en": ["a"]}}, r"`answers` got \{'en'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_row(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl", [{"id": "0", "question": "x", "answers": ["a"]}, row])
    if message is None:  # not a list after all
        assert load_questions(path)["answers"][1] == [row["answer"]]
        return
    with pytest.raises(ValueError, match=rf"q\.jsonl:2 \(row 1\): .*{message}"):
        load_questions(path)


def test_a_question_may_mention_tags(tmp_path):
    """Only instructions for calls are foreign."""
    for text in ("What does <b> mean in HTML?", "Is 'Question: who?' a question?", "Who wrote <answer>?"):
        (row,) = load_questions(write(tmp_path / "q.jsonl", [{"prompt": text, "answers": ["a"]}]), None)
        assert row["prompt"][0]["content"] == text
