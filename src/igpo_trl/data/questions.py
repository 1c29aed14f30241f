"""Loads questions for training and evaluation, from several layouts into one schema."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_records
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
    rows: dict[str, dict[str, Any]] = {}  # by id
    prefixes: dict[str, Path] = {}  # of made-up ids, with their files
    for each in sources:
        number_before = len(rows)
        for where, row in islice(_read(each, prompt, prefixes), limit):
            if row["id"] in rows:
                raise ValueError(f"{where}: the id {row['id']!r} is that of an earlier question. Ids must be unique.")
            rows[row["id"]] = row
        if len(rows) == number_before:
            raise ValueError(f"{each} holds no questions.")
    features = Features(
        prompt=List({"role": Value("string"), "content": Value("string")}),
        answers=List(Value("string")),
        dataset=Value("string"),
        id=Value("string"),
        hops=Value("int64"),
        supporting_titles=List(Value("string")),
    )
    return Dataset.from_list(list(rows.values()), features=features)


def _read(
    source: Source, system_prompt: str | None, prefixes: dict[str, Path]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a source in the schema, each with its location for error messages."""
    is_table = source.is_file and source.location.removesuffix(".gz").endswith((".csv", ".tsv"))
    if source.is_file:
        name, id_prefix = _file_names(Path(source.location).resolve(), prefixes)
        records = read_records(
            source.location, select_columns=lambda names: [name for name in names if name not in UNUSED_COLUMNS]
        )
    else:
        split, rows = read_dataset(source)
        name = source.dataset or Path(source.location).name
        id_prefix = f"{name}_{split}_"
        records = ((str(source), record) for record in rows)
    unanswerable = 0
    for number, (where, raw) in enumerate(records):
        if raw.get("answerable") is False:  # half of the full version of MuSiQue
            unanswerable += 1
            continue
        where = f"{where} (row {number})"
        try:
            record = read_record(parse_cells(raw) if is_table else raw, source.dataset, canonical_name(name))
            row = _to_row(record, name, f"{id_prefix}{number}", system_prompt)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"{where}: {error}" if isinstance(error, ValueError) else f"{where}: {raw!r}") from error
        yield where, row
    if unanswerable:
        logger.warning("%s: left out %d questions that are marked as not answerable.", source, unanswerable)


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
