"""Layouts of question files: recognises a record's layout and converts the record to `question`, `answers`, …"""

import re
from collections.abc import Iterable
from typing import Any

from .cells import as_text, as_texts, decode, is_missing, parse_nested
from .prompts import question_of

# Passages that come with a question. They are large, and nothing here needs them.
UNUSED_COLUMNS = frozenset({"context", "entity_pages", "search_results", "evidences_id", "positive_ctxs", "ctxs"})
UNUSED_COLUMNS |= {"negative_ctxs", "hard_negative_ctxs"}

# Columns whose cells, in a CSV or TSV file, hold several texts.
_LIST_COLUMNS = ("answers", "golden_answers", "supporting_titles")

# One page answers a question of the first three sets. Bamboogle's questions were all written to need two.
_HOPS_OF_SET = {"nq": 1, "triviaqa": 1, "popqa": 1, "hotpotqa": 2, "bamboogle": 2}
_HOPS_OF_TYPE = {"bridge": 2, "comparison": 2, "compositional": 2, "inference": 2, "bridge_comparison": 4}

Record = dict[str, Any]


def parse_cells(record: Record) -> Record:
    """
    Converts a row of a CSV or TSV file, whose cells are all strings: empty cells become `None`, `hops` an integer, and
    the cells with several texts (a list in the notation of JSON or Python, or texts separated by `|`) lists.
    """
    return {column: _parse_cell(column, text) for column, text in record.items()}


def _parse_cell(column: str, text: str) -> Any:
    if column == "hops" and text:
        if not re.fullmatch(r"\s*[0-9]+(\.0+)?\s*", text):  # 2.0, as pandas writes it where some are missing
            raise ValueError(f"`hops` is {text!r}, expected an integer.")
        return int(float(text))
    if column not in _LIST_COLUMNS:
        return text or None
    if text.lstrip().startswith(("[", "{")):
        if (value := parse_nested(text)) is not None:
            return value
        raise ValueError(f"`{column}` begins with {text.lstrip()[0]} but is not a JSON list: {text!r}.")
    return [part.strip() for part in text.split("|")] if text else []


def read_record(record: Record, dataset: str | None = None, default: str = "") -> Record:
    """
    Converts a record of any known layout to the keys `question`, `answers`, `id`, `dataset`, `hops` and
    `supporting_titles`, as far as their values are known.

    The values are not checked here, and a record of an unknown layout is returned as is. `dataset` is the set that the
    record is known to belong to, `default` the one to assume if neither `dataset` nor the layout names one.
    """
    known = _read_record(record, dataset, default)
    answers = known.get("answers")
    if any(record.get(column) for column in ("choices", "options")) and answers and isinstance(answers, list):
        if all(re.fullmatch("[A-Za-z]|[0-9]", str(text)) for text in answers):
            raise ValueError(f"the answer of this multiple-choice question is {answers}. Write down its text instead.")
    return known


def _read_record(record: Record, dataset: str | None, default: str) -> Record:
    if "question" in record and "answers" in record:  # our own
        record = record | {"answers": _own_answers(record["answers"])}
        return record if dataset is None or record.get("dataset") else record | {"dataset": dataset}
    if "question" in record and "golden_answers" in record:
        return _read_flashrag(record, dataset or _set_name(record.get("data_source")) or default)
    if "answers" in record and "prompt" in record:  # the result of `load_questions`, saved
        answers = _own_answers(record["answers"])
        return record | {"question": question_of(record["prompt"]), "answers": answers}
    if any(column in record for column in ("reward_model", "reward_spec")) or {"data_source", "prompt"} <= set(record):
        return _read_reference(record, dataset or default)
    if "input" in record and isinstance(output := decode(record.get("output")), list):
        return _read_kilt(record, output, dataset or re.sub(r"[-_.](train|dev|test)\b.*", "", default))
    if "possible_answers" in record:
        return _read_popqa(record, dataset or default)
    for column in ("answer", "Answer"):
        if isinstance(record.get(column), dict) and {"value", "Value", "aliases"} & set(record[column]):
            return _read_triviaqa(record, dataset or default)
    if "Question" in record and "Answer" in record:
        return _read_capitalised(record, dataset or default)
    if "question" in record and "answer" in record:
        return _read_single_answer(record, dataset)
    return record


def answer_list(value: Any, column: str = "answers") -> list[str]:
    """The answers in a cell as a list, the gold answer first. Raises a `ValueError` if it has no usable answers."""
    answers = [value] if isinstance(value, str) else value
    if isinstance(answers, list) and answers and all(isinstance(text, str) and text.strip() for text in answers):
        return answers
    raise ValueError(f"`{column}` is {value!r}, expected a non-empty string or a non-empty list of such strings.")


def _own_answers(value: Any) -> Any:
    """Lists of strings stay as they are, as does everything that is an error."""
    if isinstance(value, dict) or (isinstance(value, str) and value):
        return _texts({"answers": value}, "answers")
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return _texts({"answers": value}, "answers")
    return value


def _texts(record: Record, column: str, *, parse: bool = True) -> list[str]:
    try:
        return as_texts(record.get(column), parse=parse)
    except ValueError as error:
        raise ValueError(f"`{column}` {error}") from error


def _to_schema(dataset: str, record: Record, question: Any, answers: list[str]) -> Record:
    """The values that all published layouts share. The name of the set is prepended to the id."""
    identifier = record.get("id", record.get("_id"))
    return {
        "question": question,
        "answers": list(dict.fromkeys(answers)),
        "dataset": dataset,
        "id": None if is_missing(identifier) else f"{dataset}_{as_text(identifier)}",
        "hops": _hops(dataset, record),
        "supporting_titles": _titles(record),
    }


def _read_single_answer(record: Record, dataset: str | None) -> Record:
    """HotpotQA, 2WikiMultihopQA, MuSiQue and NQ-open: `question`, `answer`, and columns that identify the set."""
    identifier = str(record.get("id", record.get("_id")))
    if dataset is None and ("question_decomposition" in record or re.match(r"\dhop\d?__", identifier)):
        dataset = "musique"
    if dataset is None and "supporting_facts" in record:
        if "level" in record or re.fullmatch(r"[0-9a-f]{24}", identifier):
            dataset = "hotpotqa"
        elif "evidences" in record or record.get("type") in _HOPS_OF_TYPE:
            dataset = "2wiki"
    answers = _texts(record, "answer", parse=dataset is None) + _texts(record, "answer_aliases")
    if dataset is not None:
        return _to_schema(dataset, record, record["question"], answers)
    titles = record.get("supporting_titles") or _titles(record)
    return record | {"answers": list(dict.fromkeys(answers)), "supporting_titles": titles}


def _read_capitalised(record: Record, dataset: str) -> Record:
    """Bamboogle, whose columns are called `Question` and `Answer`, as those of many other tables are."""
    answers = _texts(record, "Answer")
    if "bamboogle" in dataset.lower():
        return _to_schema("bamboogle", record, record["Question"], answers)
    return record | {"question": record["Question"], "answers": answers}


def _read_triviaqa(record: Record, dataset: str) -> Record:
    """TriviaQA's rows on the hub, and those of its original files, whose keys are the same in CamelCase."""
    answer = record.get("answer") or {
        re.sub(r"(?<!^)(?=[A-Z])", "_", key).lower(): value for key, value in (record.get("Answer") or {}).items()
    }
    # The normalised aliases are the aliases in lower case without punctuation, which no scorer distinguishes.
    answers = [*_texts(answer, "value", parse=False), *_texts(answer, "aliases")]
    answers = [text for text in answers if text != "<unk>"]  # the test split, whose answers were never published
    question = record.get("question", record.get("Question"))
    identifier = record.get("question_id", record.get("QuestionId"))
    is_triviaqa = identifier is not None or "normalized_aliases" in answer
    if not is_triviaqa:
        return record | {"question": question, "answers": list(dict.fromkeys(answers))}
    return _to_schema("triviaqa", {"id": identifier}, question, answers)


def _read_popqa(record: Record, dataset: str) -> Record:
    answers = _texts(record, "possible_answers")
    if record.get("obj") in answers:  # the name that Wikidata shows comes first
        answers = [record["obj"], *answers]
    if not {"obj", "prop", "s_pop"} & set(record):  # another set
        return record | {"answers": list(dict.fromkeys(answers))}
    title = record.get("s_wiki_title")
    titles = {"supporting_titles": [title] if title else []}
    return _to_schema("popqa", record, record.get("question"), answers) | titles


def _read_flashrag(record: Record, dataset: str) -> Record:
    """`id`, `question`, `golden_answers`, and the original's other columns in `metadata`; also Search-R1's files."""
    metadata = decode(record.get("metadata"))
    flat = (metadata if isinstance(metadata, dict) else {}) | {"id": record.get("id")}
    return _to_schema(dataset, flat, record["question"], _texts(record, "golden_answers"))


def _read_kilt(record: Record, outputs: list[Any], dataset: str) -> Record:
    """KILT: `input`, and answers with the pages that show them, which are alternatives, in `output`."""
    answered = [output for output in outputs if isinstance(output, dict) and not is_missing(output.get("answer"))]
    pages: list[Any] = next((output["provenance"] for output in answered if output.get("provenance")), [])
    answers = as_texts([output["answer"] for output in answered])
    titles = {"supporting_titles": _distinct(page.get("title") for page in pages)}
    return _to_schema(dataset, {"id": record.get("id")}, record["input"], answers) | titles


def _read_reference(record: Record, default: str) -> Record:
    """A row of verl's layout: the IGPO authors' files, Search-R1's after verl's script, and others of its users."""
    column = "reward_spec" if "reward_spec" in record else "reward_model"
    if column not in record:
        raise ValueError(f"no column ['{column}']; got {sorted(record)}, expected at least `prompt` and `{column}`.")
    info, reward = decode(record.get("extra_info")), decode(record[column])
    info = info if isinstance(info, dict) else {}
    known = next((q for q in (record.get("question"), info.get("question")) if not is_missing(q)), None)
    if not isinstance(reward, dict) or "ground_truth" not in reward or (known is None and "prompt" not in record):
        raise ValueError(
            f"expected `prompt` to be chat messages and `{column}` to hold `ground_truth`, got "
            f"{record.get('prompt')!r} and {record[column]!r}."
        )
    answers = [text.strip() for text in _texts(reward, "ground_truth")]
    dataset = _set_name(record.get("data_source")) or default
    metadata = decode(record.get("metadata"))
    row = {
        "question": question_of(record["prompt"]) if known is None else known,
        "answers": list(dict.fromkeys(answers)),
        "dataset": dataset,
        "id": _reference_id(dataset, info.get("index")),
    }
    if "metadata" in record:
        metadata = metadata if isinstance(metadata, dict) else {}
        row |= {"hops": _hops(dataset, metadata), "supporting_titles": _titles(metadata)}
    return row


def _set_name(data_source: Any) -> str | None:
    return None if is_missing(data_source) else str(data_source).removeprefix("searchR1_")  # as verl's script names it


def _reference_id(dataset: str, index: Any) -> str | None:
    """Numbers of rows are no ids: they begin anew in every file, and a number is made up for each file anyway."""
    if is_missing(index) or not isinstance(index, str) or index.isdigit():
        return None
    return f"{dataset}_{index}" if re.fullmatch(r"(train|dev|validation|test)[-_]?\d+", index) else index


def _hops(dataset: str, record: Record) -> int | None:
    """How many pages a question needs, if the set, the question's type, its parts or its id tell."""
    if dataset in _HOPS_OF_SET:
        return _HOPS_OF_SET[dataset]
    if parts := decode(record.get("question_decomposition")):
        return len(parts)
    if (hops := _HOPS_OF_TYPE.get(str(record.get("type")))) is not None:
        return hops
    if number := re.match(r"(\d)hop", str(record.get("id"))):  # MuSiQue: 2hop__…, 3hop1__…
        return int(number.group(1))
    return len(_titles(record)) or None


def _titles(record: Record) -> list[str]:
    """Distinct titles of the pages with the evidence."""
    facts = decode(record.get("supporting_facts"))
    if isinstance(facts, dict):  # HotpotQA on the hub: columns of titles and of sentence numbers
        return _distinct(facts.get("title") or [])
    if facts:  # pairs, or one object per fact
        return _distinct(fact.get("title") if isinstance(fact, dict) else fact[0] for fact in facts)
    if paragraphs := decode(record.get("paragraphs")):  # MuSiQue
        return _distinct(part.get("title") for part in paragraphs if part.get("is_supporting"))
    steps = decode(record.get("question_decomposition")) or []  # MuSiQue without its paragraphs
    supports = [decode(step.get("support_paragraph")) for step in steps if isinstance(step, dict)]
    return _distinct(support.get("title") for support in supports if isinstance(support, dict))


def _distinct(titles: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(as_text(title) for title in titles if title))
