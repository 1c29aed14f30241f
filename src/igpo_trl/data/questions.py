"""Questions for training and evaluation, from several layouts to one schema."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_file
from .layouts import Record, read_record
from .prompts import THINK_SYSTEM_PROMPT, resolve_system_prompt
from .sets import Source, canonical_name, find_sources, read_dataset

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Names of files that say which split they hold, not which set: the folder is the better name.
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
      the layouts in which NQ-open, TriviaQA, HotpotQA, 2WikiMultihopQA, MuSiQue, Bamboogle and PopQA are published;
      FlashRAG's (`golden_answers`); or the IGPO authors' parquet (`reward_model.ground_truth`);
    - one of the seven sets by name: `nq`, `triviaqa`, `popqa`, `hotpotqa`, `2wiki`, `musique`, `bamboogle`;
    - `owner/name` or `owner/name/configuration` of any other data set on the hub in one of these layouts, or a folder
      with such a data set.

    `name:split` names a split, as in `hotpotqa:train` or `nq:train[:1000]`.

    Args:
        source (`str`, `Path` or sequence of these):
            The source; several as a list, or separated by commas.
        system_prompt (`str` or `Path`, *optional*, defaults to `THINK_SYSTEM_PROMPT`):
            First message of every prompt: `"think"`, `"no_think"`, `"none"`, a text file or the text itself, see
            [`resolve_system_prompt`]. `None` leaves the system message out.
        split (`str`, *optional*):
            Split of those data sets that name none themselves; by default the one that papers report for the seven
            sets. A file has no splits: it is read whole.
        limit (`int`, *optional*):
            At most so many questions of each source, the first ones.

    Returns:
        `datasets.Dataset` with the columns `prompt` (chat messages), `answers` (list of strings, the gold one first),
        `dataset`, `id` (unique), `hops` (`None` where it is not known) and `supporting_titles` (empty where not
        known).

    Raises:
        FileNotFoundError: There is no such file or data set.
        ValueError: The layout is not known, a column is missing, an answer is empty or no string, an id is repeated
            (the message names the row), or there are no questions.
    """
    from datasets import Dataset, Features, List, Value

    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    prompt = resolve_system_prompt(system_prompt)
    sources = find_sources(source, split)  # all of them, before the first one is read
    rows: list[dict[str, Any]] = []
    ids: set[str] = set()
    for each in sources:
        found = 0
        for where, row in islice(_read(each, prompt), limit):
            if row["id"] in ids:
                raise ValueError(f"{where}: the id {row['id']!r} is that of an earlier question. Ids must be unique.")
            ids.add(row["id"])
            rows.append(row)
            found += 1
        if not found:
            raise ValueError(f"{each} holds no questions.")
    features = Features(
        prompt=List({"role": Value("string"), "content": Value("string")}),
        answers=List(Value("string")),
        dataset=Value("string"),
        id=Value("string"),
        hops=Value("int64"),
        supporting_titles=List(Value("string")),
    )
    return Dataset.from_list(rows, features=features)


def _read(source: Source, system_prompt: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a source in the schema, each with where it stands."""
    if source.is_file:
        name, id_start = _file_names(Path(source.location))
        records = read_file(Path(source.location))
    else:
        split, rows = read_dataset(source)
        name = source.dataset or Path(source.location).name
        id_start = f"{name}_{split}_"
        records = ((str(source), record) for record in rows)
    without_answer = 0
    for number, (where, raw) in enumerate(records):
        if raw.get("answerable") is False:  # half of the full version of MuSiQue
            without_answer += 1
            continue
        where = f"{where} (row {number})"
        try:
            record = read_record(raw, source.dataset, canonical_name(name))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{where}: {error}" if isinstance(error, ValueError) else f"{where}: {raw!r}") from error
        yield where, _row(where, record, name, f"{id_start}{number}", system_prompt)
    if without_answer:
        logger.warning("%s: left out %d questions that are marked as not answerable.", source, without_answer)


def _file_names(path: Path) -> tuple[str, str]:
    """The name of the set in a file, and how the ids begin that its rows get where they have none."""
    stem = path.name.split(".")[0]
    if stem.lower() in _SPLIT_NAMES and path.resolve().parent.name:
        folder = path.resolve().parent.name
        return folder, f"{folder}-{stem}-"
    return stem, f"{stem}-"


def _row(where: str, record: Record, name: str, default_id: str, system_prompt: str | None) -> dict[str, Any]:
    """Checks one record with `question`, `answers`, … and brings it into the schema."""
    for column in ("question", "answers"):
        if column not in record:
            raise ValueError(
                f"{where}: no column `{column}`; got {sorted(map(str, record))}, expected at least `question` and "
                "`answers`, or another layout of docs/data.md."
            )
    question, answers = record["question"], record["answers"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: `question` is {question!r}, expected a non-empty string.")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        raise ValueError(
            f"{where}: `answers` is {answers!r}, expected at least one string. (The test splits of some sets are "
            "published without answers.)"
        )
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{where}: `answers` has {answer!r}, expected non-empty strings.")
    hops, titles = record.get("hops"), record.get("supporting_titles") or []
    if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int)):
        raise ValueError(f"{where}: `hops` is {hops!r}, expected an integer.")
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise ValueError(f"{where}: `supporting_titles` is {titles!r}, expected a list of strings.")
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return {
        "prompt": messages,
        "answers": answers,
        "dataset": str(record.get("dataset") or name),
        "id": str(record["id"]) if record.get("id") is not None else default_id,
        "hops": hops,
        "supporting_titles": titles,
    }


def hold_out(questions: "Dataset", number: int) -> tuple["Dataset", "Dataset"]:
    """
    Splits questions into training and held-out ones, by a hash of their ids.

    The same questions are held out in every run and on every machine, and a smaller held-out set is part of a larger
    one: what was held out from a warm start is held out from the training after it.

    Args:
        questions (`datasets.Dataset`):
            Questions with the column `id`.
        number (`int`):
            How many to hold out.

    Returns:
        The training and the held-out questions, the former in their order, the latter in that of the hash.

    Raises:
        ValueError: `number` is negative, or leaves nothing to train on.
    """
    if not 0 <= number < len(questions):
        raise ValueError(
            f"cannot hold out {number} of {len(questions)} questions. Expected 0 to {len(questions) - 1}."
        )
    order = order_by_hash(questions["id"][:])
    return questions.select(sorted(order[number:])), questions.select(order[:number])


def order_by_hash(ids: Sequence[str]) -> list[int]:
    """Indices of questions in the order of a hash of their ids: the same on every machine, whatever the file's order."""
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
