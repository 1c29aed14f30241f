"""
A world in English: encyclopedia passages about people, places, works and organisations that do not exist, and
questions of one to four hops about them.

Nobody can know the answers, so every point is earned by searching; and every question can be answered, with the facts
that its passages state.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import cache_dir, replace_when_complete
from .graph import FEWEST, World
from .names import Draw
from .passages import write_passage
from .questions import MAX_HOPS, Questions

__all__ = ["DEFAULT_HOPS", "EnglishWorld", "SPLITS", "WORLD", "find_corpus", "make_world", "world_file", "write_world"]

WORLD = "world"
"""Name of the default world, wherever questions or a corpus are asked for."""

DEFAULT_SIZE, DEFAULT_TRAIN, DEFAULT_TEST = 2000, 2000, 500
DEFAULT_HOPS = (0.25, 0.3, 0.25, 0.2)
SPLITS = ("train", "test")
_TEST_SHARE = 0.25


@dataclass(frozen=True)
class EnglishWorld:
    """
    Passages and questions, as records of their files.

    Attributes:
        corpus (`list[dict]`): `id`, `title` and `text` of every passage, of training and test in a mixed order.
        questions (`dict[str, list[dict]]`): Questions by split, see `docs/world.md`.
    """

    corpus: list[dict[str, str]]
    questions: dict[str, list[dict[str, Any]]]


def make_world(
    seed: int = 0,
    size: int = DEFAULT_SIZE,
    train: int = DEFAULT_TRAIN,
    test: int = DEFAULT_TEST,
    hops: Sequence[float] = DEFAULT_HOPS,
) -> EnglishWorld:
    """
    Makes a world. The same arguments give the same world, on every machine.

    Three quarters of the passages belong to the training questions and a quarter to the test questions. The two parts
    share no name, but one corpus holds both, so that one index serves both.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of names, facts, texts and questions.
        size (`int`, *optional*, defaults to `2000`): Number of passages.
        train, test (`int`, *optional*, default to `2000` and `500`): Numbers of questions.
        hops (sequence of `float`, *optional*, defaults to `(0.25, 0.3, 0.25, 0.2)`): Shares of questions of 1, 2, 3
            and 4 hops.

    Raises:
        ValueError: A number is out of range, or there are not so many different questions.
    """
    if size * _TEST_SHARE < FEWEST:
        raise ValueError(f"`size` must be at least {round(FEWEST / _TEST_SHARE)} passages, got {size}.")
    if min(train, test) < 0:
        raise ValueError(f"the number of questions must not be negative, got {train} and {test}.")
    if len(hops) > MAX_HOPS or not all(share >= 0 for share in hops) or not 0 < sum(hops) < math.inf:
        raise ValueError(f"`hops` must be one to {MAX_HOPS} weights that are not all 0, got {list(hops)}.")
    corpus: list[dict[str, str]] = []
    questions: dict[str, list[dict[str, Any]]] = {}
    in_test = round(size * _TEST_SHARE)
    for part, (split, passages, number) in enumerate([("train", size - in_test, train), ("test", in_test, test)]):
        world = World(seed, part, passages)
        draw = Draw("text", seed, part)
        texts = {entity: write_passage(entity, draw) for entity in world.entities}
        ids = {entity: f"{split}-{index}" for index, entity in enumerate(world.entities)}
        corpus += [{"id": ids[entity], "title": entity.name, "text": text} for entity, text in texts.items()]
        made = Questions(world, texts, ids, Draw("questions", seed, part)).make(number, hops)
        questions[split] = [
            {"id": f"{WORLD}_{seed}_{split}_{index}", "dataset": WORLD} | question
            for index, question in enumerate(made)
        ]
    return EnglishWorld(Draw("corpus", seed).shuffled(corpus), questions)


def write_world(directory: str | Path, command: str = "", **options: Any) -> EnglishWorld:
    """
    Writes `corpus.jsonl.gz`, `train.jsonl.gz`, `test.jsonl.gz` and `manifest.json`.

    Args:
        directory (`str` or `Path`): Folder; files of these names in it are replaced.
        command (`str`, *optional*): What the manifest says made it.
        **options: As for [`make_world`].
    """
    world, directory = make_world(**options), Path(directory)
    tables: dict[str, Sequence[dict[str, Any]]] = {"corpus": world.corpus, **world.questions}
    manifest: dict[str, Any] = {"command": command, "options": options}
    for name, records in tables.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        manifest[name] = {"records": len(records), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        with replace_when_complete(directory / f"{name}.jsonl.gz") as path:
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
    with replace_when_complete(directory / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return world


def world_file(name: str) -> Path:
    """
    A file of the default world in the cache, which is made if need be.

    Args:
        name (`str`): `"corpus"`, `"train"` or `"test"`.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    path = cache_dir("world", version, f"{name}.jsonl.gz")
    if not path.with_name("manifest.json").is_file():
        write_world(path.parent, "igpo world")
    return path


def find_corpus(corpus: str | Path) -> Path:
    """The path of a corpus, which may be the name [`WORLD`]; `./world` is a file of that name."""
    return world_file("corpus") if str(corpus) == WORLD else Path(corpus)
