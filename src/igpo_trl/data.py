"""Questions for training and evaluation, from several layouts to one schema."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._jsonl import read_json_lines

if TYPE_CHECKING:
    from datasets import Dataset

THINK_SYSTEM_PROMPT = """\
You answer questions by searching for evidence. In every turn, first reason inside <think> and </think>. Then do one \
of two things: call a tool, as often as you need over the turns, or, once the evidence is enough, answer.
Give the final answer inside <answer> and </answer>: a name, a number or a few words, without an explanation."""
"""System prompt for models that reason in the open before they act."""

NO_THINK_SYSTEM_PROMPT = """\
You answer questions by searching for evidence. In every turn do one of two things: call a tool, as often as you need \
over the turns, or, once the evidence is enough, answer.
Give the final answer inside <answer> and </answer>: a name, a number or a few words, without an explanation."""
"""System prompt for models that do not reason in the open."""

ANSWER_SEPARATOR = "<|answer_split|>"
"""Joins the aliases of an answer in the data files of the IGPO authors."""


def load_questions(source: str | Path, system_prompt: str | None = THINK_SYSTEM_PROMPT) -> "Dataset":
    """
    Loads a file of questions.

    - `.jsonl` and `.jsonl.gz`: one object per line with `question` and `answers` (the gold answer, then its aliases),
      and optionally `id`, `dataset`, `hops` and `supporting_titles`.
    - `.parquet` in the layout of the IGPO authors: `prompt` (chat messages, of which the last one is the question),
      `reward_model.ground_truth` (aliases joined by `<|answer_split|>`), `data_source` and `extra_info.index`.

    Args:
        source (`str` or `Path`):
            The file.
        system_prompt (`str`, *optional*, defaults to `THINK_SYSTEM_PROMPT`):
            First message of every prompt. `NO_THINK_SYSTEM_PROMPT` suits models that do not reason in the open; `None`
            leaves the system message out.

    Returns:
        `datasets.Dataset` with the columns `prompt` (chat messages), `answers` (list of strings, the gold one first),
        `dataset`, `id`, `hops` (`None` where it is not known) and `supporting_titles` (empty where not known).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The layout is not known, a column is missing, an answer is empty or no string, an id is repeated
            (the message names the row), or there are no questions.
    """
    from datasets import Dataset, Features, List, Value

    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of questions: {path}")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        records = read_json_lines(path)
    elif path.suffix == ".parquet":
        records = _read_reference_parquet(path)
    else:
        raise ValueError(f"{path}: unknown layout. Expected a .jsonl, .jsonl.gz or .parquet file.")

    rows: list[dict[str, Any]] = []
    ids: set[str] = set()
    for where, record in records:
        row = _row(where, record, path, len(rows), system_prompt)
        if row["id"] in ids:
            raise ValueError(f"{where}: the id {row['id']!r} is that of an earlier question. Ids must be unique.")
        ids.add(row["id"])
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no questions.")
    features = Features(
        prompt=List({"role": Value("string"), "content": Value("string")}),
        answers=List(Value("string")),
        dataset=Value("string"),
        id=Value("string"),
        hops=Value("int64"),
        supporting_titles=List(Value("string")),
    )
    return Dataset.from_list(rows, features=features)


def _row(where: str, record: dict[str, Any], path: Path, number: int, system_prompt: str | None) -> dict[str, Any]:
    """Checks one record with `question`, `answers`, … and brings it into the schema."""
    for column in ("question", "answers"):
        if column not in record:
            raise ValueError(
                f"{where} (row {number}): no column `{column}`; got {sorted(record)}, expected at least `question` "
                "and `answers`."
            )
    question, answers = record["question"], record["answers"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where} (row {number}): `question` is {question!r}, expected a non-empty string.")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where} (row {number}): `answers` is {answers!r}, expected at least one string.")
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{where} (row {number}): `answers` has {answer!r}, expected non-empty strings.")
    hops, titles = record.get("hops"), record.get("supporting_titles") or []
    if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int)):
        raise ValueError(f"{where} (row {number}): `hops` is {hops!r}, expected an integer.")
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise ValueError(f"{where} (row {number}): `supporting_titles` is {titles!r}, expected a list of strings.")
    name = path.name.split(".")[0]
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return {
        "prompt": messages,
        "answers": answers,
        "dataset": str(record.get("dataset") or name),
        "id": str(record["id"]) if record.get("id") is not None else f"{name}-{number}",
        "hops": hops,
        "supporting_titles": titles,
    }


def _read_reference_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a parquet file of the IGPO authors as records with `question` and `answers`."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}).") from error
    expected = ("data_source", "prompt", "reward_model")
    if missing := [column for column in expected if column not in table.column_names]:
        raise ValueError(f"{path}: no column {missing}; got {table.column_names}, expected at least {list(expected)}.")
    for number, row in enumerate(table.to_pylist()):
        try:
            question = row["prompt"][-1]["content"]
            truth = row["reward_model"]["ground_truth"]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path} (row {number}): expected `prompt` to be chat messages and `reward_model` to hold "
                f"`ground_truth`, got {row['prompt']!r} and {row['reward_model']!r}."
            ) from error
        answers = [part.strip() for part in truth.split(ANSWER_SEPARATOR)] if isinstance(truth, str) else truth
        yield (
            str(path),
            {
                "question": question,
                "answers": list(dict.fromkeys(answers)) if isinstance(answers, list) else answers,
                "dataset": row["data_source"],
                "id": (row.get("extra_info") or {}).get("index"),
            },
        )


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
    ids = questions["id"][:]
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return questions.select(sorted(order[number:])), questions.select(order[:number])
