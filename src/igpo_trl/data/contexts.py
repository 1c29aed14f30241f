"""Corpora from the paragraphs that come with questions, and questions that name their passages by id."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_json_lines
from .cells import decode
from .layouts import Record
from .questions import RawRecord, read_question, read_records_of, to_record
from .sets import CONTEXT_SETS, find_sources

_LISTS = ("ctxs", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs")
_WITHOUT = 1000  # questions without paragraphs after which a source is given up


class Paragraph(NamedTuple):
    """A paragraph that comes with a question; `supporting` is `None` where only its title can tell."""

    title: str
    text: str
    supporting: bool | None = None

    @property
    def id(self) -> str:
        """Hash of title and text without extra space: the same in every set, split and order."""
        text = f"{' '.join(self.title.split())}\n{' '.join(self.text.split())}"
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


class ContextCounts(NamedTuple):
    """What a source has added to a corpus: its questions, their paragraphs, and those that were new."""

    source: str
    questions: int
    paragraphs: int
    passages: int


def title_keys(titles: Iterable[str]) -> set[str]:
    """What titles are compared by: neither case nor extra space counts."""
    return {" ".join(title.casefold().split()) for title in titles}


def build_corpus(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    questions: str | Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> list[ContextCounts]:
    """
    Writes the distinct paragraphs that come with questions to a JSON Lines file: `id`, `title` and `text`.

    Two paragraphs are the same if title and text are. Sources are read one question at a time; only the ids stay in
    memory, about 100 bytes each.

    Args:
        source (`str`, `Path` or sequence of these):
            `hotpotqa`, `2wiki` or `musique`, or as for [`load_questions`] questions that have a column `context`,
            `paragraphs` or `ctxs`; one or several.
        out (`str` or `Path`): The file, which appears when it is complete; compressed if it ends in `.gz`.
        questions (`str` or `Path`, *optional*):
            A file for the questions, without their paragraphs, but with `supporting_ids`: the ids of the passages that
            are marked as supporting, or else have a supporting title.
        split, limit: As for [`load_questions`].
        track (`Callable`, *optional*): Shows progress, as `tqdm` does: called with an iterable and `desc`.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A source has no paragraphs, or a row is malformed. Nothing is written then.
    """
    sources = find_sources(source, split, with_contexts=True)
    ids, counts = set[int](), list[ContextCounts]()
    with write_json_lines(out) as write, write_json_lines(questions) if questions else nullcontext() as write_question:
        prefixes: dict[str, Path] = {}
        for each in sources:
            number_before, asked, total = len(ids), 0, 0
            rows = read_records_of(each, prefixes, all_columns=True)
            for raw in track(islice(rows, limit), desc=str(each)):
                paragraphs = read_paragraphs(raw.record, raw.where)
                asked, total = asked + 1, total + len(paragraphs)
                if not total and asked >= _WITHOUT:
                    break
                for paragraph in paragraphs:
                    number = int(paragraph.id, 16)
                    if number not in ids:
                        ids.add(number)
                        write({"id": paragraph.id, "title": paragraph.title, "text": paragraph.text})
                if write_question is not None:
                    write_question(_question(raw, read_question(raw), paragraphs))
            if not total:
                raise ValueError(
                    f"{each}: no passages come with these questions. Expected `context`, as HotpotQA, "
                    "2WikiMultihopQA and SQuAD have it, `paragraphs`, as MuSiQue has them, or `ctxs`. Of the sets by "
                    f"name, {', '.join(CONTEXT_SETS)} have passages."
                )
            counts.append(ContextCounts(str(each), asked, total, len(ids) - number_before))
    return counts


def _question(raw: RawRecord, row: dict[str, Any], paragraphs: Sequence[Paragraph]) -> Record:
    titles = title_keys(row["supporting_titles"])
    supporting = [
        paragraph.id
        for paragraph in paragraphs
        if (title_keys([paragraph.title]) <= titles if paragraph.supporting is None else paragraph.supporting)
    ]
    record = {name: value for name, value in raw.record.items() if name not in ("context", "paragraphs", *_LISTS)}
    if isinstance(metadata := decode(record.get("metadata")), dict):
        record["metadata"] = {name: value for name, value in metadata.items() if name != "context"}
    return to_record(row, record) | {"supporting_ids": list(dict.fromkeys(supporting))}


def read_paragraphs(record: Record, where: str = "record") -> list[Paragraph]:
    """
    The paragraphs of a record that have a text, in any of the published layouts.

    Args:
        record (`dict`): A record with `context`, `paragraphs` or `ctxs`, which may also lie in `metadata`.
        where (`str`, *optional*): Location of the record, for error messages.

    Raises:
        ValueError: Such a column cannot be read.
    """
    metadata = decode(record.get("metadata"))
    flat = (metadata if isinstance(metadata, dict) else {}) | record
    paragraphs: list[Paragraph] = []
    for column in ("context", "paragraphs", *_LISTS):
        value = flat.get(column)
        try:
            paragraphs += [
                paragraph._replace(title=paragraph.title.strip(), text=paragraph.text.strip())
                for paragraph in _parse(value, flat.get("title") or "")
                if paragraph.text.strip()
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"expected paragraphs with titles and texts in `{column}`, got {value!r:.200}"
            raise ValueError(f"{where}: {problem}.") from error
    return paragraphs


def _parse(value: Any, title: str) -> list[Paragraph]:
    parsed = decode(value)
    if isinstance(value, str) and not isinstance(parsed, dict | list):  # SQuAD
        return [Paragraph(title, value)]
    if isinstance(parsed, dict):  # columns, as on the hub
        texts = parsed["sentences"] if "sentences" in parsed else parsed["content"]
        return [Paragraph(*pair) for pair in zip(parsed["title"], map(_join, texts), strict=True)]
    return [_paragraph(each) for each in parsed or ()]


def _paragraph(value: Any) -> Paragraph:
    if isinstance(value, dict):  # MuSiQue, DPR
        text = value["paragraph_text"] if "paragraph_text" in value else value["text"]
        return Paragraph(value.get("title") or "", text, value.get("is_supporting"))
    title, sentences = value
    return Paragraph(title, _join(sentences))


def _join(sentences: str | Sequence[str]) -> str:
    """A paragraph from its sentences. Those of HotpotQA have their spaces, those of 2WikiMultihopQA have not."""
    if isinstance(sentences, str):
        return sentences
    joints = zip(sentences, sentences[1:], strict=False)
    spaced = any(left[-1:].isspace() or right[:1].isspace() for left, right in joints)
    return ("" if spaced else " ").join(sentences)
