"""The seven sets by name, downloaded from a server on the loopback interface that imitates the hub."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
import question_layouts as layouts
import yaml

from igpo_trl.data import QUESTION_SETS
from igpo_trl.data.sets import ORIGINAL_SETS

COMMIT = "a" * 40
TRAIN_PAGES = {"title": ["Dune (novel)"], "sentences": [["It is", " a long novel."]]}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that downloads of data sets need; `server.repositories` maps names to files."""

    protocol_version = "HTTP/1.1"

    def send(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value):
        self.send(json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        kind, owner, name, *rest = [*(parts[1:] if is_api else parts), "", "", ""]
        rest = [part for part in rest if part]
        files = self.server.repositories.get(f"{owner}/{name}")
        if kind != "datasets" or files is None:
            return self.send(b"{}", 404, X_Error_Code="RepoNotFound")
        if is_api and rest[:1] == ["tree"]:
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            return self.send_json(self.tree(files, "/".join(rest[2:]), recursive))
        if is_api:
            return self.send_json(
                {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            )
        body = files.get("/".join(rest[2:]))
        if body is None:
            return self.send(b"", 404, X_Error_Code="EntryNotFound")
        self.server.downloads.append(f"{owner}/{name}/{'/'.join(rest[2:])}")
        self.send(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    @staticmethod
    def tree(files, folder, recursive):
        entries = {}
        for path, body in files.items():
            if not path.startswith(f"{folder}/" if folder else ""):
                continue
            below = path[len(folder) + 1 if folder else 0 :].split("/")
            if recursive or len(below) == 1:
                entry = {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            else:
                path = f"{folder}/{below[0]}" if folder else below[0]
                entry = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            entries[path] = entry
        return list(entries.values())

    def log_message(self, *args):
        pass


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def card(**configs) -> bytes:
    """The README of a repository with several configurations: `{configuration: {split: path}}`."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configs.items()
    ]
    return f"---\n{yaml.safe_dump({'configs': listed})}---\n".encode()


def repositories() -> dict[str, dict[str, bytes]]:
    """Every repository that has a short name, with the same files as the original."""
    flashrag: dict[str, bytes] = {}
    configs: dict[str, dict[str, str]] = {}
    for config, (split, rows) in layouts.FLASHRAG.items():
        splits = {split: rows}
        if config not in ("popqa", "bamboogle"):
            splits["train"] = [row | {"id": row["id"].replace(split, "train")} for row in rows]
        configs[config] = {name: f"{config}/{name}.jsonl" for name in splits}
        flashrag |= {f"{config}/{name}.jsonl": jsonl(rows) for name, rows in splits.items()}
    popqa = layouts.POPQA[0]
    tsv = ["\t".join(popqa), "\t".join('"' + str(cell).replace('"', '""') + '"' for cell in popqa.values())]
    trivia = {name: {"validation": f"{name}/validation-00000-of-00001.parquet"} for name in ("rc", "rc.nocontext")}
    hotpot = {name: {"validation": f"{name}/validation-*.parquet"} for name in ("distractor", "fullwiki")}
    hotpot["distractor"]["train"] = "distractor/train-*.parquet"
    musique = {"default": {"validation": "full.jsonl"}, "answerable": {"validation": "musique_ans_v1.0_dev.jsonl"}}
    return {
        "RUC-NLPIR/FlashRAG_datasets": {"README.md": card(**configs), **flashrag},
        "google-research-datasets/nq_open": {
            "README.md": card(nq_open={"validation": "nq_open/validation-*"}),
            "nq_open/validation-00000-of-00001.parquet": parquet(layouts.NQ_OPEN),
        },
        "mandarjoshi/trivia_qa": {
            "README.md": card(**trivia),
            "rc/validation-00000-of-00001.parquet": parquet([{"wrong": "configuration"}]),
            "rc.nocontext/validation-00000-of-00001.parquet": parquet(layouts.TRIVIAQA),
        },
        "hotpotqa/hotpot_qa": {
            "README.md": card(**hotpot),
            "fullwiki/validation-00000-of-00001.parquet": parquet([{"wrong": "configuration"}]),
            "distractor/validation-00000-of-00001.parquet": parquet(layouts.HOTPOTQA),
            "distractor/train-00000-of-00001.parquet": parquet([layouts.HOTPOTQA[0] | {"context": TRAIN_PAGES}]),
        },
        "framolfese/2WikiMultihopQA": {"data/validation-00000-of-00001.parquet": parquet(layouts.TWOWIKI)},
        "xanhho/2WikiMultihopQA": {"dev.parquet": parquet(layouts.TWOWIKI_TEXT)},
        "dgslibisey/MuSiQue": {"musique_ans_v1.0_dev.jsonl": jsonl(layouts.MUSIQUE)},
        "bdsaglam/musique": {
            "README.md": card(**musique),
            "full.jsonl": jsonl([{"wrong": "configuration"}]),
            "musique_ans_v1.0_dev.jsonl": jsonl(layouts.MUSIQUE),
        },
        "chiayewken/bamboogle": {"data/test-00000-of-00001-1.parquet": parquet(layouts.BAMBOOGLE)},
        "akariasai/PopQA": {"test.tsv": ("\n".join(tsv) + "\n").encode()},
        "someone/mine": {"data/train.jsonl": jsonl([{"question": "x", "answers": ["a"], "id": "1"}])},
        "someone/script": {"script.py": b"raise SystemExit"},
    }


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.downloads = repositories(), []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


WANTED = [
    *QUESTION_SETS,
    *(original.repository for original in ORIGINAL_SETS.values()),
    *("nq,2wiki:train", "hotpotqa:train[:1]", "TQ", "nq_open", "RUC-NLPIR/FlashRAG_datasets/musique:dev"),
    *("someone/mine", "someone/mine:test", "someone/absent", "someone/script", "hotpotqa:validation", "nq/nq/nq"),
]


CORPORA = ["hotpotqa", "2wiki", "musique", "hotpotqa:train", "hotpotqa:dev,2wiki,musique", "musique:test", "nq_open"]
CORPORA += ["RUC-NLPIR/FlashRAG_datasets/hotpotqa:dev", "bdsaglam/musique/answerable"]


def load_all() -> None:
    """Loads every source from standard input and prints rows, or the error. Runs in a separate process."""
    from igpo_trl.data import build_corpus, load_questions
    from igpo_trl.search.passages import read_passages

    def passages(source):
        build_corpus(source, f"{os.environ['HF_HOME']}/corpus.jsonl.gz")
        return [passage.title for passage in read_passages(f"{os.environ['HF_HOME']}/corpus.jsonl.gz")]

    results = {}
    for source in json.load(sys.stdin):
        try:
            kind, _, name = source.rpartition(" ")
            results[source] = passages(name) if kind else load_questions(source, None).to_list()
        except (OSError, ValueError) as error:
            results[source] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


@pytest.fixture(scope="module")
def loaded(hub, repository, tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(repository / "src"), str(repository / "tests")]),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, __file__]
    wanted = [*WANTED, *(f"corpus {source}" for source in CORPORA)]
    options = {"env": environment, "input": json.dumps(wanted), "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_short_names(loaded, hub, name):
    rows = loaded[name]
    assert not isinstance(rows, str), rows
    split, published = layouts.FLASHRAG[QUESTION_SETS[name].config]
    assert split == QUESTION_SETS[name].split
    assert [row["id"] for row in rows] == [f"{name}_{row['id']}" for row in published]
    assert {row["dataset"] for row in rows} == {name}
    assert [row["answers"] for row in rows] == [row["golden_answers"] for row in published]
    assert [row["prompt"][0]["content"] for row in rows] == [row["question"] for row in published]
    assert [row["hops"] for row in rows] == [hops for _, hops, _ in layouts.EXPECTED[name]][: len(rows)]
    if "supporting_facts" in str(published) or name == "musique":
        assert [row["supporting_titles"] for row in rows] == [titles for _, _, titles in layouts.EXPECTED[name]]
    assert f"RUC-NLPIR/FlashRAG_datasets/{QUESTION_SETS[name].config}/{split}.jsonl" in hub.downloads


@pytest.mark.parametrize("original", ORIGINAL_SETS.values(), ids=lambda original: original.repository)
def test_originals(loaded, original):
    rows = loaded[original.repository]
    assert not isinstance(rows, str), rows
    assert {row["dataset"] for row in rows} == {original.dataset}
    parts = [(row["answers"], row["hops"], row["supporting_titles"]) for row in rows]
    assert parts == layouts.EXPECTED[original.dataset]
    assert all(row["id"].startswith(f"{original.dataset}_") for row in rows)


def test_splits_and_several_sources(loaded):
    assert [row["id"] for row in loaded["nq,2wiki:train"]] == ["nq_test_0", "2wiki_train_0", "2wiki_train_1"]
    assert [row["id"] for row in loaded["hotpotqa:train[:1]"]] == ["hotpotqa_train_0"]
    assert loaded["TQ"] == loaded["triviaqa"]
    assert loaded["nq_open"] == loaded["google-research-datasets/nq_open"]
    assert [row["id"] for row in loaded["nq_open"]] == ["nq_validation_0", "nq_validation_1"]
    assert loaded["RUC-NLPIR/FlashRAG_datasets/musique:dev"] == loaded["musique"]
    assert [row["id"] for row in loaded["someone/mine"]] == ["1"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/absent", "FileNotFoundError: no such file of questions, and no data set either: someone/absent"),
        ("someone/script", "ValueError: someone/script: could not be loaded"),
        ("hotpotqa:validation", "Unknown split \"validation\". Should be one of ['dev', 'train']"),
        ("someone/mine:test", 'Unknown split "test"'),
        ("nq/nq/nq", "FileNotFoundError"),
    ],
)
def test_errors(loaded, source, message):
    assert message in loaded[source]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hotpotqa", ["Dune (novel)", "Frank Herbert", "Arrakis"]),
        ("2wiki", ["Dune (novel)", "Frank Herbert", "Arrakis"]),
        ("musique", ["Arrakis", "Dune (novel)", "Frank Herbert"]),
        ("bdsaglam/musique/answerable", ["Arrakis", "Dune (novel)", "Frank Herbert"]),
        ("hotpotqa:train", ["Dune (novel)"]),
        ("hotpotqa:dev,2wiki,musique", ["Dune (novel)", "Frank Herbert", "Arrakis", "Dune (novel)"]),
        ("RUC-NLPIR/FlashRAG_datasets/hotpotqa:dev", ["Dune (novel)", "Frank Herbert", "Arrakis"]),
        ("musique:test", "Unknown split \"test\". Should be one of ['validation']"),
        ("nq_open", "no passages come with these questions"),
    ],
)
def test_corpora(loaded, source, expected):
    result = loaded[f"corpus {source}"]
    assert expected in result if isinstance(expected, str) else result == expected


if __name__ == "__main__":
    load_all()
