"""Record files, replacement of files and folders, and the cache directory."""

import gzip
import json
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_trl.files import cache_dir, looks_like_path, read_records, replace_when_complete, write_json_lines

RECORDS = [{"id": "1", "text": "a"}, {"id": "2", "text": "b"}]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("x.jsonl", '{"id": "1", "text": "a"}\n\n{"id": "2", "text": "b"}\n', [":1", ":3"]),
        ("x.json", json.dumps(RECORDS), ["", ""]),
        ("x.json", json.dumps({"Data": RECORDS}), ["", ""]),
        ("x.csv", '\ufeffid,text\n1,a\n"2",b\n', [":2", ":3"]),
        ("X.TSV", "id\ttext\n1\ta\n2\tb\n", [":2", ":3"]),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_format_gives_the_same_records(tmp_path, name, text, lines, ending):
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending else text.encode())
    assert list(read_records(path)) == [(f"{path}{line}", record) for line, record in zip(lines, RECORDS, strict=True)]


def test_columns_of_a_parquet_file_are_selected(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "x.parquet")
    selected = read_records(tmp_path / "x.parquet", select_columns=lambda names: [n for n in names if n != "id"])
    assert [record for _, record in selected] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        # Quotes that are text: inches, titles, a quotation that never ends.
        (['1\t"Dune" is a novel.\tDune', "2\tb\tB"], ['"Dune" is a novel.', "b"]),
        (
            ['1\t"Dune is a novel.\tDune', '2\tA 12" record\tB', '3\tc"\tC'],
            ['"Dune is a novel.', 'A 12" record', 'c"'],
        ),
        (['1\ta\t"Dune', "2\tb\tB", '3\tc\tC"'], ["a", "b", "c"]),
        (['1\t"a\tA', '2\t"b"\tB', '3\t"c\tC', '4\td"\tD'], ['"a', "b", '"c', 'd"']),
        (['1\t"a""\tA', '2\t"""\tB', '3\t""b""\tC'], ['"a""', '"""', '""b""']),
        (["1\ta\tA", '2\tb\t"B'], ["a", "b"]),  # at the end of the file
        # Quotes of CSV: around the whole cell, with tabs and line ends in it.
        (['1\t"A ""novel""."\tA', '2\t""""\tB', "3\t\tC"], ['A "novel".', '"', ""]),
        (['1\t"a\tb"\tA', '2\t"""a""\t"\tB'], ["a\tb", '"a"\t']),
        (['1\t"one', "", 'two"\t"A', 'A"', '2\t"b"\tB', '3\t"c', 'c"\tC'], ["one\n\ntwo", "b", "c\nc"]),
        (['1\ta\t"A', 'A"', "2\tb\tB"], ["a", "b"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_in_tab_separated_files(tmp_path, lines, texts, end):
    path = tmp_path / "x.tsv"
    path.write_bytes(end.join(["id\ttext\ttitle", *lines, ""]).encode())
    records = [record for _, record in read_records(path)]
    assert [record["text"].replace("\r\n", "\n") for record in records] == texts
    assert [record["id"] for record in records] == [str(i) for i in range(1, len(texts) + 1)]


@pytest.mark.parametrize(
    ("lines", "row", "got"),
    [
        (["1\ta\tA", '2\t"b', "3\tc\tC"], 3, 2),  # the third column is missing
        (['1\t"a\tA', "b", "2\tc\tC"], 3, 1),  # no quote closes
        (['1\t"a\tb\tc"', "2\tc\tC"], 2, 4),
        (["1\ta\tb\tA", "2\tc\tC"], 2, 4),
    ],
)
def test_a_row_with_too_few_or_too_many_cells_is_named(tmp_path, lines, row, got):
    path = tmp_path / "x.tsv"
    path.write_text("\n".join(["id\ttext\ttitle", *lines, ""]))
    with pytest.raises(ValueError, match=rf"x\.tsv:{row}: got {got} columns, expected \['id', 'text', 'title'\]"):
        list(read_records(path))


cells = st.lists(st.sampled_from(['"', '""', "a", " ", ",", "é", "\\"]), max_size=5).map("".join)


@settings(deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_no_row_is_taken_into_its_neighbour(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tsv")
        path.write_text(
            "".join("\t".join(row) + "\n" for row in [("id", "text", "title"), *(("i", *r) for r in rows)])
        )
        records = [record for _, record in read_records(path)]
    assert len(records) == len(rows)
    for record, (text, title) in zip(records, rows, strict=True):
        for got, written in ((record["text"], text), (record["title"], title)):
            assert got == written or f'"{got.replace(chr(34), chr(34) * 2)}"' == written


def test_long_cells(tmp_path):
    (tmp_path / "x.tsv").write_text(f'id\ttext\n1\t"{"b " * 100_000}\tc"\n')
    (tmp_path / "x.csv").write_text(f'id,text\n1,"{"b " * 100_000},c"\n')
    assert [len(record["text"]) for name in ("x.tsv", "x.csv") for _, record in read_records(tmp_path / name)] == [
        200_002
    ] * 2


def test_misplaced_quotes_in_comma_separated_files(tmp_path):
    (tmp_path / "x.csv").write_text('id,text\n1,"a" b\n')
    with pytest.raises(ValueError, match=r"x\.csv:\d: not a readable table"):
        list(read_records(tmp_path / "x.csv"))


def test_a_quote_that_takes_rows_with_it_is_an_error(tmp_path):
    """CSV would read rows 3 and 4 as part of row 2."""
    path = tmp_path / "x.csv"
    path.write_text('id,text\n1,a\n2,"Dune\n3,b\n4,c"\n')
    with pytest.raises(ValueError, match=r"x\.csv:3: a quote opens a cell that ends in line 5.*JSON Lines"):
        list(read_records(path))
    path.write_text('id,text\n1,"a\nb, c\n\nd"\n2,"e,\nf"\n')  # line ends and commas in quoted cells
    assert [record["text"] for _, record in read_records(path)] == ["a\nb, c\n\nd", "e,\nf"]


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert [record for _, record in read_records(path)] == RECORDS


def test_a_file_or_folder_is_replaced_when_it_is_complete(tmp_path):
    (tmp_path / "file").write_text("old")
    with replace_when_complete(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "folder").mkdir()
    for fails in (True, False):
        try:
            with replace_when_complete(tmp_path / "folder") as temporary:
                temporary.mkdir()
                (temporary / "part").write_text("x")
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert not any((tmp_path / "folder").iterdir())
    assert (tmp_path / "folder" / "part").read_text() == "x"
    with pytest.raises(OSError), replace_when_complete(tmp_path / "folder") as temporary:  # the folder is not empty
        temporary.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("name", ["new/lines.jsonl", "new/lines.jsonl.gz"])
def test_written_lines_are_read_back(tmp_path, name):
    records = [{"text": "é\u2028\n", "list": [1, None, True]}, {"lone": "\ud800"}, {}]
    with write_json_lines(tmp_path / name) as write:
        for record in records:
            write(record)
        assert not (tmp_path / name).exists()
    first = (tmp_path / name).read_bytes()
    assert [record for _, record in read_records(tmp_path / name)] == records
    with write_json_lines(tmp_path / name) as write:
        list(map(write, records))
    assert (tmp_path / name).read_bytes() == first  # no time or name in it
    with pytest.raises(KeyError), write_json_lines(tmp_path / name) as write:
        write({"half": 1})
        raise KeyError
    assert (tmp_path / name).read_bytes() == first and len(list((tmp_path / "new").iterdir())) == 1


def test_cache_dir_and_model_names(monkeypatch, tmp_path):
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path))
    assert cache_dir("bm25", "x") == tmp_path / "bm25" / "x"
    monkeypatch.delenv("IGPO_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "igpo_trl")
    assert all(map(looks_like_path, ("./model", "/model", "~/model", "outputs/model", "a/b/c")))
    assert not any(map(looks_like_path, ("model", "owner/model")))
