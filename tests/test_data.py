"""Loads questions from files into the schema of training."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from igpo_trl.data import NO_THINK_SYSTEM_PROMPT, THINK_SYSTEM_PROMPT, load_questions

QUESTION = {"id": "q1", "dataset": "toy", "question": "Who wrote Dune?", "answers": ["Frank Herbert", "Herbert"]}


def write(path: Path, *records) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_jsonl_becomes_chat_messages_and_aliases(tmp_path, name):
    full = QUESTION | {"hops": 2, "supporting_titles": ["Dune", "Frank Herbert"], "type": "ignored"}
    bare = {"question": "Where?", "answers": "Tacoma"}
    dataset = load_questions(write(tmp_path / name, full, bare))
    assert dataset.column_names == ["prompt", "answers", "dataset", "id", "hops", "supporting_titles"]
    assert dataset[0] == {
        "prompt": [
            {"role": "system", "content": THINK_SYSTEM_PROMPT},
            {"role": "user", "content": "Who wrote Dune?"},
        ],
        "answers": ["Frank Herbert", "Herbert"],
        "dataset": "toy",
        "id": "q1",
        "hops": 2,
        "supporting_titles": ["Dune", "Frank Herbert"],
    }
    assert dataset[1]["answers"] == ["Tacoma"]
    assert (dataset[1]["dataset"], dataset[1]["id"]) == ("mine", "mine-1")
    assert (dataset[1]["hops"], dataset[1]["supporting_titles"]) == (None, [])


def test_system_prompt_is_a_choice(tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTION)
    assert load_questions(path, NO_THINK_SYSTEM_PROMPT)[0]["prompt"][0]["content"] == NO_THINK_SYSTEM_PROMPT
    assert load_questions(path, system_prompt=None)[0]["prompt"] == [{"role": "user", "content": "Who wrote Dune?"}]
    assert "<think>" in THINK_SYSTEM_PROMPT and "<think>" not in NO_THINK_SYSTEM_PROMPT
    for prompt in (THINK_SYSTEM_PROMPT, NO_THINK_SYSTEM_PROMPT):
        assert "<answer>" in prompt and "decide whether another one is needed" in prompt


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x", "answers": []}, r"q\.jsonl:2 \(row 1\): `answers` is \[\]"),
        ({"question": "x", "answers": ["a", ""]}, r"q\.jsonl:2 \(row 1\): `answers` is \['a', ''\]"),
        ({"question": "x", "answers": ["a", " \n"]}, r"\(row 1\): `answers` is \['a', ' \\n'\]"),
        ({"question": "x", "answers": [1965]}, r"\(row 1\): `answers` is \[1965\]"),
        ({"question": "x", "answers": None}, r"\(row 1\): `answers` is None"),
        ({"question": "x", "answers": ""}, r"\(row 1\): `answers` is ''"),
        ({"question": "x"}, r"q\.jsonl:2 \(row 1\): no column `answers`; got \['question'\]"),
        ({"answers": ["a"]}, r"no column `question`"),
        ({"question": " ", "answers": ["a"]}, r"`question` is ' '"),
        ({"question": "x", "answers": ["a"], "hops": "two"}, r"`hops` is 'two'"),
        ({"question": "x", "answers": ["a"], "supporting_titles": [1]}, r"`supporting_titles` is \[1\]"),
        (QUESTION, r"the id 'q1' is that of an earlier question"),
        (["x"], r"q\.jsonl:2: got list"),
    ],
)
def test_bad_rows_are_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        load_questions(write(tmp_path / "q.jsonl", QUESTION, record))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_questions(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="holds no questions"):
        load_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="unknown layout"):
        load_questions(write(tmp_path / "q.txt", QUESTION))
    path = tmp_path / "q.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="damaged after row 0, or not a parquet file"):
        load_questions(path)


def reference_row(truth: object = "Frank Herbert<|answer_split|>Herbert", index: str = "dune_1") -> dict:
    return {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Who wrote Dune?"}],
        "reward_model": {"ground_truth": truth, "style": "unknown"},
        "extra_info": {"index": index, "split": "dev"},
    }


def write_parquet(path: Path, *rows) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_reference_parquet_splits_aliases(tmp_path):
    dataset = load_questions(write_parquet(tmp_path / "r.parquet", reference_row(), reference_row("A", "2")))
    assert dataset[0]["prompt"][-1] == {"role": "user", "content": "Who wrote Dune?"}
    assert dataset["answers"][:] == [["Frank Herbert", "Herbert"], ["A"]]
    assert (dataset[0]["dataset"], dataset[0]["id"], dataset[0]["hops"]) == ("nq", "dune_1", None)


def test_reference_parquet_errors_name_the_row(tmp_path):
    with pytest.raises(ValueError, match=r"r\.parquet \(row 1\): `answers` is \['A', ''\]"):
        load_questions(write_parquet(tmp_path / "r.parquet", reference_row(), reference_row("A<|answer_split|>", "2")))
    with pytest.raises(ValueError, match=r"no column \['reward_model'\]"):
        load_questions(write_parquet(tmp_path / "r.parquet", {"data_source": "nq", "prompt": []}))
    with pytest.raises(ValueError, match=r"\(row 0\): expected `prompt` to be chat messages"):
        load_questions(write_parquet(tmp_path / "r.parquet", reference_row() | {"prompt": []}))


def test_real_files(shared_dir):
    counts = {"hotpotqa": 535, "2wiki": 1063, "musique": 952, "popqa": 641, "nq": 541, "plain_extra": 710}
    for name, count in counts.items():
        assert len(load_questions(shared_dir / f"data/questions/{name}.jsonl.gz")) == count
    dataset = load_questions(shared_dir / "data/reference_format.parquet")
    assert len(dataset) == 2133
    assert set(dataset["dataset"]) == {"tq", "musique", "2wiki", "popqa", "nq", "hotpotqa", "Bamboogle"}
    assert max(len(answers) for answers in dataset["answers"]) > 10
