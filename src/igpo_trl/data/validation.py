"""Checks questions before training: unusable questions are errors, doubtful ones are counted and shown."""

import logging
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .layouts import answer_list
from .prompts import question_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_ANSWER_TOKENS = 64
MAX_ANSWER_WORDS = 32


@dataclass(frozen=True)
class Finding:
    """Doubtful questions of one kind in one split: the kind, their number, and a few examples."""

    split: str
    message: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.split}: {self.count} {self.message}, as {'; '.join(self.examples)}"


@dataclass(frozen=True)
class QuestionReport:
    """The result of [`check_questions`]: the number of questions per split, and the findings."""

    sizes: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there are findings."""
        return bool(self.findings)

    def __str__(self) -> str:
        sizes = ", ".join(f"{split} {size:,}" for split, size in self.sizes.items())
        return "\n".join([f"Questions: {sizes}.", *(f"{finding}." for finding in self.findings)])


def check_questions(
    train: "Dataset",
    eval_sets: "Dataset | Mapping[str, Dataset] | None" = None,
    *,
    tokenizer: Any = None,
    max_answer_length: int | None = None,
    examples: int = 3,
    answer_column: str = "answers",
    warn: bool = True,
) -> QuestionReport:
    """
    Checks questions before a model is loaded.

    Counts and shows: answers that equal the question; gold answers that are too long for a useful belief; questions
    that are repeated in a split; evaluation questions that are also training questions. Questions and answers are
    compared without regard to case, punctuation and space.

    Args:
        train (`datasets.Dataset`): Questions with the columns `prompt` and `answers`, and optionally `id`, as
            [`load_questions`] returns them.
        eval_sets (`datasets.Dataset` or mapping of names to these, *optional*): Evaluation questions.
        tokenizer (*optional*): Measures answers in tokens. Without one they are measured in words.
        max_answer_length (`int`, *optional*): Longest gold answer that is not a finding. Defaults to 64 tokens, or 32
            words.
        examples (`int`, *optional*, defaults to `3`): How many questions to show for each finding.
        answer_column (`str`, *optional*, defaults to `"answers"`): Name of the column with the answers.
        warn (`bool`, *optional*, defaults to `True`): Log each finding as a warning.

    Returns:
        [`QuestionReport`]: true if there are findings; as text, one line for each.

    Raises:
        ValueError: An answer is missing or empty (the message names split and row), or a column is missing.
    """
    splits: dict[str, Dataset] = {"train": train}
    if isinstance(eval_sets, Mapping):
        splits |= {f"eval[{name}]": dataset for name, dataset in eval_sets.items()}
    elif eval_sets is not None:
        splits["eval"] = eval_sets
    if max_answer_length is None:
        max_answer_length = MAX_ANSWER_WORDS if tokenizer is None else MAX_ANSWER_TOKENS
    unit = "words" if tokenizer is None else "tokens"

    report = QuestionReport({split: len(dataset) for split, dataset in splits.items()})
    train_keys: set[str] = set()
    for split, dataset in splits.items():
        rows = _rows(split, dataset, answer_column)
        keys = [_comparison_key(question) for question, _, _ in rows]
        first_row = {key: i for i, key in reversed(list(enumerate(keys)))}
        doubtful = {
            "answers that equal the question": [
                i for i, (_, answers, _) in enumerate(rows) if keys[i] in map(_comparison_key, answers)
            ],
            f"gold answers of more than {max_answer_length} {unit}": _too_long(rows, tokenizer, max_answer_length),
            "repeated questions": [i for i, key in enumerate(keys) if first_row[key] < i],
            "questions that are also trained on": [i for i, key in enumerate(keys) if key in train_keys],
        }
        for message, numbers in doubtful.items():
            if numbers:
                shown = tuple(f"{rows[i][2]} {_shorten(rows[i][0])}" for i in numbers[:examples])
                report.findings.append(Finding(split, message, len(numbers), shown))
        if split == "train":
            train_keys = set(keys)
    if warn:
        for finding in report.findings:
            logger.warning("%s.", finding)
    return report


Row = tuple[str, list[str], str]  # question, answers, id


def _rows(split: str, dataset: "Dataset", answer_column: str) -> list[Row]:
    columns = ["prompt", answer_column, *(["id"] if "id" in dataset.column_names else [])]
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"{split}: no column {missing}; got {dataset.column_names}.")
    rows: list[Row] = []
    for number, row in enumerate(dataset.select_columns(columns).with_format(None)):
        try:
            answers = answer_list(row[answer_column], answer_column)
        except ValueError as error:
            raise ValueError(f"{split}, row {number}: {error} Drop or repair the row.") from error
        rows.append((str(question_text(row["prompt"])), answers, str(row.get("id", number))))
    return rows


def _too_long(rows: list[Row], tokenizer: Any, limit: int) -> list[int]:
    gold = [answers[0] for _, answers, _ in rows]
    if tokenizer is None:
        return [i for i, answer in enumerate(gold) if len(answer.split()) > limit]
    # A token has at least one byte, so most answers need not be tokenized.
    long = [i for i, answer in enumerate(gold) if len(answer.encode()) > limit]
    lengths = map(len, tokenizer([gold[i] for i in long], add_special_tokens=False)["input_ids"]) if long else []
    return [i for i, length in zip(long, lengths, strict=True) if length > limit]


def _comparison_key(text: str) -> str:
    """The text without case, punctuation and extra space; the text itself if nothing is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(" " if unicodedata.category(c).startswith("P") else c for c in folded)
    return " ".join(letters.split()) or folded.strip()


def _shorten(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")
