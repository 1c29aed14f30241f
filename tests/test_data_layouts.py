"""Every published layout of the seven sets, written to files in its published form, is converted to the schema."""

import csv
import gzip
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import question_layouts as layouts
from hypothesis import given
from hypothesis import strategies as st

from igpo_trl.data import load_questions
from igpo_trl.data.layouts import read_record


def write(path: Path, rows, **options) -> Path:
    """Writes rows in the format that the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith((".csv", ".tsv")):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",", **options)
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = ".jsonl" in path.name
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def parts(dataset):
    return [(row["answers"], row["hops"], row["supporting_titles"]) for row in dataset]


@pytest.mark.parametrize(
    ("name", "rows", "dataset", "first_id"),
    [
        ("trivia.parquet", layouts.TRIVIAQA, "triviaqa", "triviaqa_tc_2"),
        ("trivia.jsonl.gz", layouts.TRIVIAQA, "triviaqa", "triviaqa_tc_2"),
        ("unfiltered-web-dev.json", layouts.TRIVIAQA_FILE, "triviaqa", "triviaqa_tc_2"),
        ("validation.parquet", layouts.HOTPOTQA, "hotpotqa", "hotpotqa_5a7a06935542990198eaf050"),
        ("hotpot_dev_distractor_v1.json", layouts.HOTPOTQA_FILE, "hotpotqa", "hotpotqa_5a7a06935542990198eaf050"),
        ("dev.json.gz", layouts.TWOWIKI_FILE, "2wiki", "2wiki_8813f87c"),
        ("dev.parquet", layouts.TWOWIKI_TEXT, "2wiki", "2wiki_8813f87c"),
        ("validation.parquet", layouts.TWOWIKI, "2wiki", "2wiki_8813f87c"),
        ("musique_ans_v1.0_dev.jsonl", layouts.MUSIQUE, "musique", "musique_2hop__460946_294723"),
        ("musique.parquet", layouts.MUSIQUE, "musique", "musique_2hop__460946_294723"),
        ("bamboogle.parquet", layouts.BAMBOOGLE, "bamboogle", "bamboogle-0"),
        ("bamboogle.csv", layouts.BAMBOOGLE, "bamboogle", "bamboogle-0"),
        ("test.tsv", layouts.POPQA, "popqa", "popqa_4222362"),
        ("popqa.jsonl", layouts.POPQA, "popqa", "popqa_4222362"),
        ("nq/NQ-open.dev.jsonl", layouts.NQ_OPEN, "nq", "NQ-open-0"),
    ],
)
def test_published_layouts(tmp_path, name, rows, dataset, first_id):
    loaded = load_questions(write(tmp_path / name, rows))
    if dataset == "nq":  # its columns do not identify the set, so it is named after the file and has no hops
        assert set(loaded["dataset"]) == {"NQ-open"}
        assert loaded["answers"][:] == [["Frank Herbert", "Herbert"], ["1965"]]
    else:
        assert set(loaded["dataset"]) == {dataset}
        assert parts(loaded) == layouts.EXPECTED[dataset]
    assert loaded["id"][0] == first_id
    source = rows["Data"] if isinstance(rows, dict) else rows
    texts = [row.get("question", row.get("Question")) for row in source]
    assert [row["prompt"][-1]["content"] for row in loaded] == texts


@pytest.mark.parametrize("config", layouts.FLASHRAG)
def test_flashrag_files(tmp_path, config):
    split, rows = layouts.FLASHRAG[config]
    loaded = load_questions(write(tmp_path / config / f"{split}.jsonl", rows))
    name = {"2wikimultihopqa": "2wiki"}.get(config, config)
    assert set(loaded["dataset"]) == {name}
    assert loaded["id"][0] == f"{name}_{split}_0"
    assert loaded["hops"][:] == [hops for _, hops, _ in layouts.EXPECTED[name]][: len(rows)]
    if config in ("hotpotqa", "2wikimultihopqa", "musique"):
        assert parts(loaded) == layouts.EXPECTED[name]


def test_flashrag_musique_with_nested_text(tmp_path):
    (row,) = layouts.FLASHRAG["musique"][1]
    steps = row["metadata"]["question_decomposition"]
    as_text = [step | {"support_paragraph": repr(step["support_paragraph"])} for step in steps]
    row = row | {"metadata": {"question_decomposition": as_text}}
    (loaded,) = load_questions(write(tmp_path / "musique" / "dev.jsonl", [row]))
    assert (loaded["hops"], loaded["supporting_titles"]) == (2, layouts.TWO_PAGES)


def test_a_folder_is_read_as_the_hub_would_be(tmp_path):
    write(tmp_path / "mine" / "train.parquet", layouts.HOTPOTQA)
    write(tmp_path / "mine" / "test.parquet", [layouts.HOTPOTQA[0] | {"id": "other"}])
    with pytest.raises(ValueError, match=r"several splits.*train, test.*mine:train"):
        load_questions(tmp_path / "mine")
    assert load_questions(tmp_path / "mine", split="test")["id"][:] == ["hotpotqa_other"]
    (row,) = load_questions(f"{tmp_path}/mine:train")
    assert (row["answers"], row["hops"], row["supporting_titles"]) == layouts.EXPECTED["hotpotqa"][0]
    with pytest.raises(ValueError, match=r'could not be loaded.*"dev"'):
        load_questions(f"{tmp_path}/mine:dev")


def test_loaded_questions_can_be_saved_and_loaded_again(tmp_path):
    first = load_questions(write(tmp_path / "hotpot.json", layouts.HOTPOTQA_FILE), "think")
    first.save_to_disk(tmp_path / "arrow")
    first.to_parquet(tmp_path / "saved.parquet")
    first.to_json(tmp_path / "saved.jsonl")
    for name in ("arrow", "saved.parquet", "saved.jsonl"):
        again = load_questions(tmp_path / name, "think")
        assert again[:] == first[:], name
    assert load_questions(tmp_path / "arrow", None)[0]["prompt"] == first[0]["prompt"][1:]


def test_files_for_search_r1(tmp_path):
    """They have both FlashRAG's columns and the IGPO authors'."""
    row = {
        "id": "test_0",
        "question": "who wrote dune?",
        "golden_answers": ["Frank Herbert"],
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Answer the given question. … Question: who wrote dune?"}],
        "reward_model": {"ground_truth": {"target": ["Frank Herbert"]}, "style": "rule"},
        "extra_info": {"index": 0, "split": "test"},
    }
    (loaded,) = load_questions(write(tmp_path / "test.parquet", [row]), None)
    assert loaded["prompt"] == [{"role": "user", "content": "who wrote dune?"}]
    assert (loaded["dataset"], loaded["id"], loaded["hops"]) == ("nq", "nq_test_0", 1)
    bare = {name: row[name] for name in ("data_source", "prompt", "reward_model")}
    assert load_questions(write(tmp_path / "bare.parquet", [bare]))[0]["answers"] == ["Frank Herbert"]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_csv_holds_lists_as_json_or_between_bars(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffquestion,answers,hops,supporting_titles\n"
        '"Who, then?",Frank Herbert | Herbert,2,Dune|Arrakis\n'
        'Where?,"[""A | B"", ""C""]",,\n'
        '"Which\nline?",1965,,\n',
        encoding="utf-8",
    )
    loaded = load_questions(path, None)
    assert loaded["answers"][:] == [["Frank Herbert", "Herbert"], ["A | B", "C"], ["1965"]]
    assert loaded["hops"][:] == [2, None, None]
    assert loaded["supporting_titles"][:] == [["Dune", "Arrakis"], [], []]
    assert loaded["id"][:] == ["mine-0", "mine-1", "mine-2"]
    assert loaded[2]["prompt"][0]["content"] == "Which\nline?"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.csv", "question,answers\nWho?,\n", r"q\.csv:2 \(row 0\): `answers` is \[\]"),
        ("q.csv", "question,answers\nWho?,a||b\n", r"`answers` is \['a', '', 'b'\]"),
        (
            "q.csv",
            'question,answers\nWho?,"[""a"""\n',
            r"q\.csv:2 \(row 0\): `answers` begins with \[ but is not a JSON list",
        ),
        ("q.csv", "question,answers\nWho?,a,b\n", r"q\.csv:2: got 3 columns, expected \['question', 'answers'\]"),
        ("q.csv", "question,answers\nWho?\n", r"q\.csv:2: got 1 columns"),
        ("q.csv", 'question,answers\n"Who?,a\n', r"q\.csv:\d: not a readable table"),
        ("q.csv", "question,answers,hops\nWho?,a,two\n", r"q\.csv:2 \(row 0\): `hops` is 'two'"),
        ("q.csv", "question,answers\n", r"q\.csv holds no questions"),
        (
            "q.tsv",
            "question,answers\nWho?,a\n",
            r"q\.tsv:2 \(row 0\): no column `question`; got \['question,answers'\]",
        ),
        ("q.json", "[1]", r"expected a JSON array of objects"),
        ("q.json", '{"question": "x"}', r"One object per line belongs in a \.jsonl file"),
        ("q.json", "[", r"q\.json: not valid JSON"),
        ("q.json", "[{}]", r"q\.json \(row 0\): no column `question`; got \[\]"),
    ],
)
def test_bad_tables_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / name)


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(json.dumps(layouts.HOTPOTQA_FILE * 50).encode())
    (tmp_path / "q.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"q\.json\.gz: damaged or cut off"):
        load_questions(tmp_path / "q.json.gz")
    (tmp_path / "q.csv").write_bytes("question,answers\nWho?,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"q\.csv: not UTF-8 text after line 0"):
        load_questions(tmp_path / "q.csv")


# --- rows that cannot be used ----------------------------------------------------------------------------------------


def test_hidden_answers_are_an_error(tmp_path):
    hidden = layouts.TRIVIAQA[0] | {"answer": layouts.TRIVIAQA[0]["answer"] | {"value": "<unk>", "aliases": []}}
    for name, row in {
        "trivia.jsonl": hidden,
        "hotpot.jsonl": layouts.HOTPOTQA[0] | {"answer": None},
        "popqa.jsonl": layouts.POPQA[0] | {"possible_answers": "[]"},
    }.items():
        with pytest.raises(ValueError, match=r"\(row 0\): `answers` is \[\].*test splits"):
            load_questions(write(tmp_path / name, [row]))


def test_unanswerable_questions_are_left_out_and_counted(tmp_path, caplog):
    rows = [layouts.MUSIQUE[0], layouts.MUSIQUE[0] | {"id": "2hop__2", "answerable": False}]
    with caplog.at_level(logging.WARNING):
        assert len(load_questions(write(tmp_path / "musique_full.jsonl", rows))) == 1
    assert "left out 1 questions" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        layouts.HOTPOTQA[0] | {"supporting_facts": 3},
        layouts.MUSIQUE[0] | {"paragraphs": [3]},
        layouts.TRIVIAQA[0] | {"answer": {"value": 3}, "question": None},
    ],
)
def test_a_broken_row_names_itself(tmp_path, row):
    with pytest.raises(ValueError, match=r"q\.jsonl:2 \(row 1\)"):
        load_questions(write(tmp_path / "q.jsonl", [{"question": "x", "answers": ["a"]}, row]))


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["title", "value"]), inner),
    max_leaves=5,
)
columns = st.sampled_from(
    "question answer answers Question Answer golden_answers metadata supporting_facts question_decomposition "
    "answer_aliases paragraphs possible_answers prompt reward_model data_source type level id".split()
)


@given(st.dictionaries(columns, cells))
def test_any_record_is_read_or_refused(record):
    before = json.dumps(record)
    try:
        read_record(record, default="mine")
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ):  # the loader turns these into errors that name the row
        pass
    assert json.dumps(record) == before


# --- several sources -------------------------------------------------------------------------------------------------


def test_several_sources_are_one_data_set(tmp_path, monkeypatch):
    hotpot = write(tmp_path / "hotpot.json", layouts.HOTPOTQA_FILE)
    wiki = write(tmp_path / "2wiki.json", layouts.TWOWIKI_FILE)
    together = load_questions([hotpot, str(wiki)])
    assert together["dataset"][:] == ["hotpotqa", "2wiki", "2wiki"]
    assert load_questions(f"{hotpot},{wiki} ,")[:] == together[:]
    assert load_questions([wiki, hotpot], limit=1)["dataset"][:] == ["2wiki", "hotpotqa"]
    with pytest.raises(ValueError, match="Ids must be unique"):
        load_questions([hotpot, hotpot])
    many = [
        write(tmp_path / f"{'part' * 10}{i}.jsonl", [{"id": str(i), "question": "x", "answers": ["a"]}])
        for i in range(9)
    ]
    monkeypatch.chdir(tmp_path)
    assert len(load_questions(",".join(path.name for path in many))) == 9  # too long for a file name
    with pytest.raises(ValueError, match="no source of questions"):
        load_questions(" , ")
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        load_questions(hotpot, limit=0)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):  # before the first one is read
        load_questions([tmp_path / "q.txt", tmp_path / "absent.json"][1:] + [hotpot])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hotpotq", "Did you mean hotpotqa"),
        ("muzique:train", "Did you mean musique"),
        ("what is this", "Expected a file"),
    ],
)
def test_an_unknown_name_is_a_clear_error(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_questions(name)


def test_without_a_network_the_error_names_the_data_set():
    with pytest.raises(ValueError, match=r"FlashRAG_datasets \(nq, test\): could not be loaded"):
        load_questions("nq")
