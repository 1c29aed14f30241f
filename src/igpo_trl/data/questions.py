"""Loads questions for training and evaluation, from several layouts into one schema."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import read_records, write_json_lines
from .cells import as_text, is_missing
from .layouts import UNUSED_COLUMNS, Record, answer_list, parse_cells, read_record
from .prompts import THINK_SYSTEM_PROMPT, plain_text, resolve_system_prompt
from .sets import Source, canonical_name, find_sources, read_dataset

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# File names that tell the split rather than the set. The folder then names the set.
_SPLIT_NAMES = {"train", "dev", "val", "valid", "validation", "test", "eval", "data", "questions"}


def load_questions(
    source: str | Path | Sequence[str | Path],
    system_prompt: str | Path | None = THINK_SYSTEM_PROMPT,
    *,
    split: str | None = None,
    limit: int | None = None,
) -> "Dataset":
    """
    Loads questions from one or several sources.

    A source is

    - a file: JSON Lines, JSON, CSV or TSV, each also as `.gz`, or parquet. Its columns tell its layout: `question` and
      `answers` (the gold answer, then its aliases), and optionally `id`, `dataset`, `hops` and `supporting_titles`;
      the layouts in which NQ-open, TriviaQA, HotpotQA, 2WikiMultihopQA, MuSiQue, Bamboogle, PopQA and SQuAD are
      published; FlashRAG's and Search-R1's (`golden_answers`); verl's, which the IGPO authors use
      (`reward_model.ground_truth`); DPR's (`nq-test.csv`); or KILT's (`input`, `output`);
    - one of the seven sets by name: `nq`, `triviaqa`, `popqa`, `hotpotqa`, `2wiki`, `musique`, `bamboogle`; or
      `world`, questions about a made-up world (docs/world.md);
    - `owner/name` or `owner/name/configuration` of another data set on the hub in one of these layouts, or a folder
      with such a data set.

    `name:split` names a split, as in `hotpotqa:train` or `nq:train[:1000]`.

    Args:
        source (`str`, `Path` or sequence of these): The source, or several as a list or separated by commas.
        system_prompt (`str` or `Path`, *optional*, defaults to `THINK_SYSTEM_PROMPT`): First message of every prompt:
            `"think"`, `"no_think"`, `"none"`, a text file or the text itself, see [`resolve_system_prompt`]. `None`
            omits the system message.
        split (`str`, *optional*): Split of the data sets for which `source` names none. Defaults, for the seven sets,
            to the split that papers report. A file has no splits and is read whole.
        limit (`int`, *optional*): Number of questions to read from each source, from its beginning. Defaults to all.

    Returns:
        `datasets.Dataset` with the columns `prompt` (chat messages), `answers` (list of strings, the gold one first),
        `dataset`, `id` (unique), `hops` (`None` if unknown) and `supporting_titles` (empty if unknown).

    Raises:
        FileNotFoundError: The file or data set does not exist.
        ValueError: The layout is unknown, a column is missing, an answer is empty or not a string, an id is repeated
            (the message names the row), or there are no questions.
    """
    from datasets import Dataset, Features, List, Value

    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    prompt = resolve_system_prompt(system_prompt)
    sources = find_sources(source, split)  # all of them, before the first one is read
    rows = [row for row, _ in read_questions(sources, prompt, limit)]
    features = Features(
        prompt=List({"role": Value("string"), "content": Value("string")}),
        answers=List(Value("string")),
        dataset=Value("string"),
        id=Value("string"),
        hops=Value("int64"),
        supporting_titles=List(Value("string")),
    )
    return Dataset.from_list(rows, features=features)


def read_questions(
    sources: Sequence[Source], system_prompt: str | None = None, limit: int | None = None, *, all_columns: bool = False
) -> Iterator[tuple[dict[str, Any], Record]]:
    """
    Reads the questions of resolved sources one by one: rows as of [`load_questions`], each with its record.

    Args:
        sources (sequence of `Source`): As of [`find_sources`].
        system_prompt (`str`, *optional*): First message of every prompt.
        limit (`int`, *optional*): Number of questions to read from each source.
        all_columns (`bool`, *optional*, defaults to `False`): Whether the records have all their columns, also the
            passages that come with the questions.
    """
    ids = set[str]()
    prefixes: dict[str, Path] = {}  # of made-up ids, with their files
    for source in sources:
        number_before = len(ids)
        for raw in islice(read_records_of(source, prefixes, all_columns), limit):
            row = read_question(raw, system_prompt)
            if row["id"] in ids:
                problem = f"the id {row['id']!r} is that of an earlier question. Ids must be unique."
                raise ValueError(f"{raw.where}: {problem}")
            ids.add(row["id"])
            yield row, raw.record
        if len(ids) == number_before:
            raise ValueError(f"{source} holds no questions.")


class RawRecord(NamedTuple):
    """A record of a source, where it stands, its set (if known), and a name and an id where it has none itself."""

    record: Record
    where: str
    dataset: str | None
    default_name: str
    default_id: str


def read_records_of(source: Source, prefixes: dict[str, Path], all_columns: bool = False) -> Iterator[RawRecord]:
    """
    Reads the records of a source one by one, without those that are marked as not answerable.

    Args:
        source (`Source`): As of [`find_sources`].
        prefixes (`dict`): Of made-up ids, with their files; shared by all sources that are read together.
        all_columns (`bool`, *optional*, defaults to `False`): Whether to read the passages that come with the
            questions.
    """
    is_table = source.is_file and source.location.removesuffix(".gz").endswith((".csv", ".tsv"))
    if source.is_file:
        name, id_prefix = _file_names(Path(source.location).resolve(), prefixes)
        unused = frozenset[str]() if all_columns else UNUSED_COLUMNS
        records = read_records(
            source.location, select_columns=lambda names: [name for name in names if name not in unused]
        )
    else:
        split, rows = read_dataset(source, all_columns)
        name = source.dataset or Path(source.location).name
        id_prefix = f"{name}_{split}_"
        records = ((str(source), record) for record in rows)
    unanswerable = 0
    for number, (where, record) in enumerate(records):
        if record.get("answerable") is False:  # half of the full version of MuSiQue
            unanswerable += 1
            continue
        where = f"{where} (row {number})"
        try:
            record = parse_cells(record) if is_table else record
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield RawRecord(record, where, source.dataset, name, f"{id_prefix}{number}")
    if unanswerable:
        logger.warning("%s: left out %d questions that are marked as not answerable.", source, unanswerable)


def read_question(raw: RawRecord, system_prompt: str | None = None) -> dict[str, Any]:
    """The row of [`load_questions`] for a record. Raises a `ValueError` that names the record if there is none."""
    try:
        record = read_record(raw.record, raw.dataset, canonical_name(raw.default_name))
        return _to_row(record, raw.default_name, raw.default_id, system_prompt)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        problem = error if isinstance(error, ValueError) else repr(raw.record)
        raise ValueError(f"{raw.where}: {problem}") from error


def _file_names(path: Path, prefixes: dict[str, Path]) -> tuple[str, str]:
    """The name of the set in a file, and the prefix of the ids of rows without one: unlike that of any other file."""
    name = prefix = path.name.split(".")[0]
    folders = [folder.name for folder in path.parents if folder.name]
    if name.lower() in _SPLIT_NAMES and folders:
        name = folders.pop(0)
        prefix = f"{name}-{prefix}"
    while prefixes.setdefault(prefix, path) != path and folders:
        prefix = f"{folders.pop(0)}-{prefix}"
    return name, f"{prefix}-"


def _to_row(record: Record, name: str, default_id: str, system_prompt: str | None) -> dict[str, Any]:
    """Checks a record with `question`, `answers`, … and converts it to the schema."""
    for column in ("question", "answers"):
        if column not in record:
            raise ValueError(
                f"no column `{column}`; got {sorted(map(str, record))}, expected at least `question` and `answers`, "
                "or another layout of docs/data.md."
            )
    question, hops, titles = record["question"], record.get("hops"), record.get("supporting_titles") or []
    if isinstance(question, list):
        question = plain_text(question)
    if isinstance(hops, float):  # as pandas writes integers where some are missing
        hops = None if is_missing(hops) else int(hops) if hops.is_integer() else hops
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"`question` is {question!r}, expected a non-empty string.")
    if record["answers"] == []:
        raise ValueError(
            "`answers` is [], expected at least one string. (The test splits of some sets are published without "
            "answers.)"
        )
    if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int)):
        raise ValueError(f"`hops` is {hops!r}, expected an integer.")
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise ValueError(f"`supporting_titles` is {titles!r}, expected a list of strings.")
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return {
        "prompt": messages,
        "answers": answer_list(record["answers"]),
        "dataset": name if is_missing(record.get("dataset")) else as_text(record["dataset"]),
        "id": default_id if is_missing(record.get("id")) else as_text(record["id"]),
        "hops": hops,
        "supporting_titles": titles,
    }


def write_questions(
    path: str | Path,
    source: str | Path | Sequence[str | Path],
    ids: Collection[str],
    *,
    split: str | None = None,
    limit: int | None = None,
) -> None:
    """
    Writes the questions with the given ids to a JSON Lines file that [`load_questions`] reads, see
    [`write_json_lines`]: the columns of the schema, then all other columns that the sources have.

    Args:
        path (`str` or `Path`): The file.
        source, split, limit: As for [`load_questions`].
        ids (collection of `str`): Ids as of [`load_questions`].
    """
    with write_json_lines(path) as write:
        for row, record in read_questions(find_sources(source, split), limit=limit, all_columns=True):
            if row["id"] in ids:
                write(to_record(row, record))


def to_record(row: dict[str, Any], record: Record) -> Record:
    """A question as a record of this project's own layout: a row of [`load_questions`], and its other columns."""
    question = {"question": row["prompt"][-1]["content"]} | {name: row[name] for name in row if name != "prompt"}
    return question | {name: value for name, value in record.items() if name not in question}


def hold_out(questions: "Dataset", number: int) -> tuple["Dataset", "Dataset"]:
    """
    Splits questions into training and held-out ones, by a hash of their ids.

    The split is the same in every run and on every machine, and a smaller held-out set is part of a larger one.
    Questions held out from a warm start are therefore also held out from the training after it.

    Args:
        questions (`datasets.Dataset`): Questions with the column `id`.
        number (`int`): How many to hold out.

    Returns:
        The training questions in their order, and the held-out questions in the order of the hash.

    Raises:
        ValueError: `number` is negative, or no question is left to train on.
    """
    if not 0 <= number < len(questions):
        raise ValueError(
            f"cannot hold out {number} of {len(questions)} questions. Expected 0 to {len(questions) - 1}."
        )
    order = order_by_hash(questions["id"][:])
    return questions.select(sorted(order[number:])), questions.select(order[:number])


def order_by_hash(ids: Sequence[str]) -> list[int]:
    """Indices of questions, sorted by a hash of their ids: the same order on every machine and for every file."""
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
