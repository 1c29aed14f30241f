"""Record files, replacement of files and folders, and the cache directory."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from igpo_trl.files import cache_dir, looks_like_path, read_records, replace_when_complete

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


def test_misplaced_quotes_and_long_cells(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text(f'id\ttext\n1\t"a" b\n2\t{"b" * 200_000}\n')
    with pytest.raises(ValueError, match=r"x\.tsv:\d: not a readable table"):
        list(read_records(path))
    first, second = (record["text"] for _, record in read_records(path, strict=False))
    assert (first, len(second)) == ("a b", 200_000)


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


def test_cache_dir_and_model_names(monkeypatch, tmp_path):
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path))
    assert cache_dir("bm25", "x") == tmp_path / "bm25" / "x"
    monkeypatch.delenv("IGPO_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "igpo_trl")
    assert all(map(looks_like_path, ("./model", "/model", "~/model", "outputs/model", "a/b/c")))
    assert not any(map(looks_like_path, ("model", "owner/model")))
