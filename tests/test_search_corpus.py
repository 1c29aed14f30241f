"""Reading corpora: file formats, layouts, and what is wrong with them."""

import gzip
import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import PASSAGES, write

from igpo_trl.search import BM25Index, Passage
from igpo_trl.search.passages import read_passages, split_contents


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([PASSAGES[0], {"id": "x", "title": "T"}], r"c\.jsonl:2: no field `text`"),
        ([PASSAGES[0], {"title": "T", "text": "words"}], r"c\.jsonl:2: no field `id`"),
        ([{"id": "x", "text": "words"}], r"c\.jsonl:1: no field `title`"),
        ([{"id": "x", "title": "T", "text": "  "}], r"c\.jsonl:1: `text` is '  '"),
        ([{"id": "x", "title": None, "text": "words"}], r"c\.jsonl:1: `title` is None"),
        ([{"id": "", "title": "T", "text": "words"}], r"c\.jsonl:1: `id` is ''"),
        ([{"id": True, "title": "T", "text": "words"}], r"c\.jsonl:1: `id` is True"),
        ([PASSAGES[0], PASSAGES[1], PASSAGES[0]], r"c\.jsonl:3: the id 'a' is already that of passage 1"),
        ([{"id": 1, "title": "", "text": "x"}, {"id": "1", "title": "", "text": "y"}], "already"),
        (["words"], r"c\.jsonl:1: got str, expected a JSON object"),
        ([], "empty"),
        ([{"id": 1, "title": "", "text": "of the"}], "no words"),
    ],
)
def test_bad_corpus_is_named_by_file_and_line(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        BM25Index.build(write(tmp_path / "c.jsonl", records), show_progress=False)


def test_bad_json_bad_bytes_and_missing_files(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(PASSAGES[0]) + '\n\n{"id": "x", \n')
    with pytest.raises(ValueError, match=r"c\.jsonl:3: not valid JSON"):
        BM25Index.build(path, show_progress=False)
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:1: not valid JSON"):
        BM25Index.build(path, show_progress=False)
    with pytest.raises(FileNotFoundError, match="absent"):
        BM25Index.build(tmp_path / "absent.jsonl", show_progress=False)
    with pytest.raises(ValueError, match="passage 2: got int"):
        BM25Index.build([PASSAGES[0], 7], show_progress=False)


def test_damaged_gzip_is_named(tmp_path):
    path = write(tmp_path / "c.jsonl.gz", [{**PASSAGES[0], "id": i, "text": f"{i * 7919} words"} for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz: damaged or cut off after line \d+"):
        BM25Index.build(path, show_progress=False)
    path.write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz: damaged"):
        BM25Index.build(path, show_progress=False)


# Other files and layouts


def test_layouts_of_other_projects(tmp_path):
    expected = [Passage("0", "Aaron", "A prophet.\nA priest."), Passage("1", "", "One line only.")]
    contents = [{"id": "0", "contents": '"Aaron"\nA prophet.\nA priest.'}, {"id": "1", "contents": "One line only."}]
    beir = [{"_id": p.id, "title": p.title, "text": p.text, "metadata": {}} for p in expected]
    titled = [{"docid": p.id, "title": p.title, "contents": p.text} for p in expected]
    for records in (contents, beir, titled):
        assert list(read_passages(write(tmp_path / "c.jsonl", records))) == expected
    dataset = Dataset.from_list(contents)
    assert list(read_passages(dataset)) == list(read_passages(dataset.to_iterable_dataset())) == expected
    assert list(read_passages(iter(expected))) == expected
    dataset.to_parquet(tmp_path / "c.parquet")
    assert list(read_passages(tmp_path / "c.parquet")) == expected
    (tmp_path / "psgs.tsv").write_text('id\ttext\ttitle\n0\t"A ""prophet""."\tAaron\n1\tOne line only.\t""\n')
    assert list(read_passages(tmp_path / "psgs.tsv")) == [Passage("0", "Aaron", 'A "prophet".'), expected[1]]
    (tmp_path / "psgs.tsv.gz").write_bytes(gzip.compress((tmp_path / "psgs.tsv").read_bytes()))
    assert len(list(read_passages([tmp_path / "psgs.tsv.gz"]))) == 2


def test_stray_quotes_lose_no_passage(tmp_path):
    texts = [
        '"Dune is a novel.',
        "By Frank Herbert.",
        'A 12" record',
        "Born in 1920.",
        'He said: "Fear',
        'is the killer."',
    ]
    path = tmp_path / "c.tsv"
    path.write_text("id\ttext\ttitle\n" + "".join(f'{i}\t{text}\t"{i}\n' for i, text in enumerate(texts)))
    assert [(p.id, p.text, p.title) for p in read_passages(path)] == [
        (str(i), text, f'"{i}') for i, text in enumerate(texts)
    ]
    assert len(BM25Index.build(path, show_progress=False)) == len(texts)


def test_other_file_formats(tmp_path):
    expected = [Passage("1", "A, B", 'x "y"'), Passage("2", "", "z")]
    records = [{"id": p.id, "title": p.title, "text": p.text} for p in expected]
    (tmp_path / "c.json").write_text(json.dumps(records))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "c.csv").write_text('id,title,text\n1,"A, B","x ""y"""\n2,,z\n')
    for name in ("c.json", "lines.json", "c.csv"):
        assert list(read_passages(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"A"\nb\nc', "A", "b\nc"),
        ("A \nb", "A", "b"),
        ('"\nb', '"', "b"),
        ("only", "", "only"),
        ('"A"\n ', "", '"A"\n '),
        ('"He said "no""\nb', 'He said "no"', "b"),
    ],
)
def test_first_line_of_contents_is_the_title(contents, title, text):
    assert split_contents(contents) == (title, text)


def test_bad_tables_are_named_by_row(tmp_path):
    for name, save in (("c.parquet", "to_parquet"), ("c.tsv", "to_csv")):
        path = tmp_path / name
        options = {"sep": "\t", "index": False} if save == "to_csv" else {}
        getattr(Dataset.from_list([{"id": "1", "title": "t", "text": "x"}] * 2), save)(path, **options)
        with pytest.raises(ValueError, match=rf"{name}.*[23].*the id '1' is already that of passage 1"):
            list(read_passages(path))
        getattr(Dataset.from_list([{"id": "1", "title": "t"}]), save)(path, **options)
        with pytest.raises(ValueError, match=rf"{name}.*no field `text`"):
            list(read_passages(path))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"c\.parquet: damaged after row 0, or not a parquet file"):
        list(read_passages(tmp_path / "c.parquet"))
    (tmp_path / "c.tsv").write_text("id\ttitle\ttext\n1\tx\n")
    with pytest.raises(ValueError, match=r"c\.tsv:2: got 2 columns, expected \['id', 'title', 'text'\]"):
        list(read_passages(tmp_path / "c.tsv"))
    with pytest.raises(FileNotFoundError, match="a directory"):
        read_passages(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_passages([write(tmp_path / "c.jsonl"), tmp_path / "absent.parquet"])  # before anything is read


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12) | st.sampled_from(["a", "01", "²", "-1"]), min_size=1, max_size=20))
def test_repeated_ids_are_found_whatever_their_order(keys):
    records = [{"id": key, "title": "", "text": "x"} for key in keys]
    seen: dict[str, int] = {}
    expected = next((seen[str(k)] for i, k in enumerate(keys, 1) if seen.setdefault(str(k), i) != i), None)
    if expected is None:
        assert [p.id for p in read_passages(records)] == list(map(str, keys))
    else:
        with pytest.raises(ValueError, match=rf"is already that of passage {expected}\b"):
            list(read_passages(records))


def test_ids_that_count_up_take_no_memory():
    from igpo_trl.search.passages import SeenIds

    ids = SeenIds()
    assert all(ids.add(str(i)) is None for i in range(7, 1000))
    assert not ids._others
    assert ids.add("8") == 2
