"""Layouts of question files: recognises a record's layout and converts the record to `question`, `answers`, …"""

import ast
import json
import re
from collections.abc import Iterable
from typing import Any

ANSWER_SEPARATOR = "<|answer_split|>"
"""Joins the aliases of an answer in the data files of the IGPO authors."""

# Passages that come with a question. They are large, and nothing here needs them.
UNUSED_COLUMNS = frozenset({"context", "entity_pages", "search_results", "evidences_id"})

# Columns whose cells, in a CSV or TSV file, hold several texts.
_LIST_COLUMNS = ("answers", "golden_answers", "supporting_titles")

# One page answers a question of the first three sets. Bamboogle's questions were all written to need two.
_HOPS_OF_SET = {"nq": 1, "triviaqa": 1, "popqa": 1, "hotpotqa": 2, "bamboogle": 2}
_HOPS_OF_TYPE = {"bridge": 2, "comparison": 2, "compositional": 2, "inference": 2, "bridge_comparison": 4}

Record = dict[str, Any]


def parse_cells(record: Record) -> Record:
    """
    Converts a row of a CSV or TSV file, whose cells are all strings: empty cells become `None`, `hops` an integer, and
    the cells with several texts (a JSON list, or texts separated by `|`) lists.
    """
    return {column: _parse_cell(column, text) for column, text in record.items()}


def _parse_cell(column: str, text: str) -> Any:
    if column == "hops" and text:
        if not text.strip().isdigit():
            raise ValueError(f"`hops` is {text!r}, expected an integer.")
        return int(text)
    if column not in _LIST_COLUMNS:
        return text or None
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split("|")] if text else []
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"`{column}` begins with [ but is not a JSON list ({error}): {text!r}.") from error


def read_record(record: Record, dataset: str | None = None, default: str = "") -> Record:
    """
    Converts a record of any known layout to the keys `question`, `answers`, `id`, `dataset`, `hops` and
    `supporting_titles`, as far as their values are known.

    The values are not checked here, and a record of an unknown layout is returned as is. `dataset` is the set that the
    record is known to belong to, `default` the one to assume if neither `dataset` nor the layout names one.
    """
    if "question" in record and "answers" in record:  # our own
        return record if dataset is None or record.get("dataset") else record | {"dataset": dataset}
    if "question" in record and "golden_answers" in record:
        return _read_flashrag(record, dataset or record.get("data_source") or default)
    if "answers" in record and isinstance(record.get("prompt"), str | list):  # the result of `load_questions`, saved
        return record | {"question": question_text(record["prompt"])}
    if "reward_model" in record or ("data_source" in record and "prompt" in record):
        return _read_reference(record)
    if "possible_answers" in record:
        return _read_popqa(record)
    if isinstance(record.get("answer"), dict) or isinstance(record.get("Answer"), dict):
        return _read_triviaqa(record)
    if "Question" in record and "Answer" in record:
        dataset = dataset or "bamboogle"
        return _to_schema(dataset, record, record["Question"], _strings(record["Answer"], split=False))
    if "question" in record and "answer" in record:
        return _read_single_answer(record, dataset)
    return record


def question_text(prompt: Any) -> Any:
    """The question in a prompt: the prompt itself if it is text, else the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def answer_list(value: Any, column: str = "answers") -> list[str]:
    """The answers in a cell as a list, the gold answer first. Raises a `ValueError` if it has no usable answers."""
    answers = [value] if isinstance(value, str) else value
    if isinstance(answers, list) and answers and all(isinstance(text, str) and text.strip() for text in answers):
        return answers
    raise ValueError(f"`{column}` is {value!r}, expected a non-empty string or a non-empty list of such strings.")


def _to_schema(dataset: str, record: Record, question: Any, answers: list[str]) -> Record:
    """The values that all published layouts share. The name of the set is prepended to the id."""
    identifier = record.get("id", record.get("_id"))
    return {
        "question": question,
        "answers": list(dict.fromkeys(answers)),
        "dataset": dataset,
        "id": None if identifier is None else f"{dataset}_{identifier}",
        "hops": _hops(dataset, record),
        "supporting_titles": _titles(record),
    }


def _read_single_answer(record: Record, dataset: str | None) -> Record:
    """HotpotQA, 2WikiMultihopQA, MuSiQue and NQ-open: `question`, `answer`, and columns that identify the set."""
    aliases: list[str] = []
    if "question_decomposition" in record or "answer_aliases" in record:
        dataset, aliases = dataset or "musique", _strings(record.get("answer_aliases"))
    elif "supporting_facts" in record:
        dataset = dataset or ("hotpotqa" if "level" in record else "2wiki")
    answers = _strings(record["answer"], split=dataset is None) + aliases
    if dataset is not None:
        return _to_schema(dataset, record, record["question"], answers)
    return record | {"answers": list(dict.fromkeys(answers))}


def _read_triviaqa(record: Record) -> Record:
    """TriviaQA's rows on the hub, and those of its original files, whose keys are the same in CamelCase."""
    answer = record.get("answer") or {
        re.sub(r"(?<!^)(?=[A-Z])", "_", key).lower(): value for key, value in (record.get("Answer") or {}).items()
    }
    # The normalised aliases are the aliases in lower case without punctuation, which no scorer distinguishes.
    answers = [*_strings(answer.get("value"), split=False), *_strings(answer.get("aliases"))]
    answers = [text for text in answers if text != "<unk>"]  # the test split, whose answers were never published
    question = record.get("question", record.get("Question"))
    identifier = record.get("question_id", record.get("QuestionId"))
    return _to_schema("triviaqa", {"id": identifier}, question, answers)


def _read_popqa(record: Record) -> Record:
    answers = _strings(record["possible_answers"])
    if record.get("obj") in answers:  # the name that Wikidata shows comes first
        answers = [record["obj"], *answers]
    title = record.get("s_wiki_title")
    titles = {"supporting_titles": [title] if title else []}
    return _to_schema("popqa", record, record.get("question"), answers) | titles


def _read_flashrag(record: Record, dataset: str) -> Record:
    """`id`, `question`, `golden_answers`, and the original's other columns in `metadata`; also Search-R1's files."""
    metadata = _decode(record.get("metadata"))
    flat = (metadata if isinstance(metadata, dict) else {}) | {"id": record.get("id")}
    return _to_schema(dataset, flat, record["question"], _strings(record["golden_answers"]))


def _read_reference(record: Record) -> Record:
    """A row of the IGPO authors' files: chat messages, and all aliases in one string."""
    expected = ("data_source", "prompt", "reward_model")
    if missing := [column for column in expected if column not in record]:
        raise ValueError(f"no column {missing}; got {sorted(record)}, expected at least {list(expected)}.")
    try:
        question = question_text(record["prompt"])
        truth = record["reward_model"]["ground_truth"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            "expected `prompt` to be chat messages and `reward_model` to hold `ground_truth`, got "
            f"{record['prompt']!r} and {record['reward_model']!r}."
        ) from error
    if isinstance(truth, dict):  # in files made for Search-R1
        truth = truth.get("target")
    answers = [part.strip() for part in truth.split(ANSWER_SEPARATOR)] if isinstance(truth, str) else truth
    return {
        "question": question,
        "answers": list(dict.fromkeys(answers)) if isinstance(answers, list) else answers,
        "dataset": record["data_source"],
        "id": (record.get("extra_info") or {}).get("index"),
    }


def _hops(dataset: str, record: Record) -> int | None:
    """How many pages a question needs, if the set, the question's type, its parts or its id tell."""
    if dataset in _HOPS_OF_SET:
        return _HOPS_OF_SET[dataset]
    if parts := _decode(record.get("question_decomposition")):
        return len(parts)
    if (hops := _HOPS_OF_TYPE.get(str(record.get("type")))) is not None:
        return hops
    if number := re.match(r"(\d)hop", str(record.get("id"))):  # MuSiQue: 2hop__…, 3hop1__…
        return int(number.group(1))
    return len(_titles(record)) or None


def _titles(record: Record) -> list[str]:
    """Distinct titles of the pages with the evidence."""
    facts = _decode(record.get("supporting_facts"))
    if isinstance(facts, dict):  # HotpotQA on the hub: columns of titles and of sentence numbers
        return _distinct(facts.get("title") or [])
    if facts:  # pairs, or one object per fact
        return _distinct(fact.get("title") if isinstance(fact, dict) else fact[0] for fact in facts)
    if paragraphs := _decode(record.get("paragraphs")):  # MuSiQue
        return _distinct(part.get("title") for part in paragraphs if part.get("is_supporting"))
    steps = _decode(record.get("question_decomposition")) or []  # MuSiQue without its paragraphs
    supports = [_decode(step.get("support_paragraph")) for step in steps if isinstance(step, dict)]
    return _distinct(support.get("title") for support in supports if isinstance(support, dict))


def _distinct(titles: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(title) for title in titles if title))


def _strings(value: Any, split: bool = True) -> list[str]:
    """The texts in a cell of answers: a list, a list written as text (`["a", "b"]`) if `split`, or a single answer."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        decoded = _decode(value) if split and value.lstrip().startswith("[") else None
        return [str(part) for part in decoded] if isinstance(decoded, list) else [value]
    return [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]


def _decode(value: Any) -> Any:
    """Decodes a cell that was written as text, in JSON or Python notation. Other cells are returned as they are."""
    if not isinstance(value, str):
        return value
    for decode in (json.loads, ast.literal_eval):
        try:
            return decode(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
