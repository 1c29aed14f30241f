"""Rows of a trainer's data sets: what is refused before a model is loaded, and what is rendered."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .prompts import plain_text

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

#: What TRL passes to reward functions beside the columns.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_columns(dataset: "Dataset | IterableDataset", name: str, *, needs_prompt: bool) -> None:
    """
    Raise `ValueError` if there is no column `prompt` although one is needed, or if a column has the name of an
    argument that TRL passes to reward functions itself.
    """
    columns = columns_of(dataset)
    if taken := [column for column in columns if column in RESERVED_COLUMNS]:
        hint = " The questions belong in a column `prompt`." if "prompts" in taken else ""
        raise ValueError(
            f"`{name}` has a column `{taken[0]}`, got {', '.join(columns)}. TRL passes an argument of that name to "
            f"every reward function. Rename or remove the column.{hint}"
        )
    if needs_prompt and "prompt" not in columns:
        raise ValueError(f"`{name}` has no column `prompt`, got {', '.join(columns)}. Rename yours.")


def check_prompts(dataset: "Dataset | IterableDataset", name: str, *, as_messages: bool) -> None:
    """
    Raise `ValueError` for a prompt that cannot be rendered; only the first row of a stream is looked at.

    Args:
        dataset (`Dataset` or `IterableDataset`): data set, with or without the column `prompt`.
        name (`str`): its name in the message.
        as_messages (`bool`): whether prompts must be lists of messages, as they must with tools.
    """
    conversational: bool | None = None
    for where, prompt in _cells(dataset, "prompt", name):
        is_text = isinstance(prompt, str)
        if is_text and as_messages:
            raise ValueError(
                f"With tools, prompts must be lists of messages, got a string in {where}. Map the data set to "
                "`{'prompt': [{'role': 'user', 'content': question}]}`."
            )
        if conversational is not None and conversational == is_text:
            raise ValueError(f"Prompts must be all texts or all lists of messages, got {prompt!r} in {where}.")
        conversational = not is_text
        try:
            messages = plain_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"{where[0].upper()}{where[1:]}: {error}") from error
        if not is_text and not (messages and all(isinstance(m, dict) and m.get("role") for m in messages)):
            raise ValueError(
                f"A prompt must be a text or a list of messages with `role` and `content`, got {prompt!r} in {where}."
            )


def check_answers(
    dataset: "Dataset | IterableDataset | None", column: str, name: str, *, optional: bool = False
) -> None:
    """
    Raise `ValueError` if the column is missing or a row, of a stream the first one, holds no usable answer.

    With `optional`, environments own the answers that are not there.
    """
    if dataset is None and optional:
        return
    if dataset is None:
        raise ValueError(
            f"Information gain needs right answers: expected a `{name}` with the column `{column}`, got none. "
            "Pass one, or let the environment own them in an attribute `answers`."
        )
    columns = columns_of(dataset)
    if column not in columns and optional:
        return
    if column not in columns:
        raise ValueError(
            f"Information gain needs right answers: `{name}` has no column `{column}`, got {', '.join(columns)}. Name "
            "yours with `IGPOConfig(answer_column=...)`, or let the environment own them in an attribute `answers`."
        )
    for where, value in _cells(dataset, column, name):
        if not (optional and value is None):
            answers_of({column: value}, column, where)


def answers_of(row: dict[str, Any], column: str, where: str = "the batch") -> tuple[str, ...]:
    """The row's answers, stripped; raises `ValueError` for anything but non-empty strings."""
    value = _without_arrays(row.get(column))
    answers: Sequence[Any] = (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        fix = "Drop or repair the row."
        if isinstance(value, dict) and "text" in value:  # as in SQuAD
            fix = f"Map the column to its texts: `dataset.map(lambda row: {{'{column}': row['{column}']['text']}})`."
        raise ValueError(
            f"An answer must be a non-empty string or a non-empty list of such, got {value!r} in column `{column}`, "
            f"{where}. {fix}"
        )
    return tuple(answer.strip() for answer in answers)


def columns_of(dataset: "Dataset | IterableDataset") -> list[str]:
    """Names of the columns; those of the first row where the data set does not know them or makes them on the fly."""
    if dataset.column_names is None or _has_transform(dataset):
        return list(next(iter(dataset), {}))
    return list(dataset.column_names)


def plain_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a batch with their prompts as [`plain_prompt`] makes them."""
    return [row | {"prompt": plain_prompt(row["prompt"])} if "prompt" in row else row for row in rows]


def plain_prompt(prompt: Any) -> Any:
    """
    A prompt as chat templates of text models render it: contents are texts rather than parts, and the fields that
    Arrow has filled with null, because other rows or calls have them, are left out.
    """
    prompt = _without_arrays(prompt)
    if not isinstance(prompt, list):
        return prompt
    return [
        _without_nulls(message) | {"content": plain_text(message.get("content") or "")}
        if isinstance(message, dict)
        else message
        for message in prompt
    ]


def _cells(dataset: "Dataset | IterableDataset", column: str, name: str) -> Iterator[tuple[str, Any]]:
    """The cells of a column, each with its row for messages; the first one only if there is no end to them."""
    from datasets import Dataset

    if column not in columns_of(dataset):
        return
    if not isinstance(dataset, Dataset) or _has_transform(dataset):
        yield f"row 0 of `{name}`", next(iter(dataset))[column]
        return
    row = 0
    for block in dataset.select_columns([column]).with_format(None).iter(batch_size=10_000):
        for value in block[column]:
            yield f"row {row} of `{name}`", value
            row += 1


def _has_transform(dataset: Any) -> bool:
    return (getattr(dataset, "format", None) or {}).get("type") == "custom"


def _without_arrays(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _without_nulls(value: Any) -> Any:
    value = _without_arrays(value)
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
