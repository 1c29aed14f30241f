"""Checks made before a model is loaded: what was got, what was expected, and how to fix it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from transformers import ProcessorMixin

from .chat_templates import prepare_for_tools
from .rollout.observations import ObservationEncoder

#: The minor version of TRL whose internals the trainer's hooks were tested against.
SUPPORTED_TRL = "1.16"


def check_trl_version() -> None:
    """Raise `ImportError` unless TRL's minor version is the one whose seams the trainer overrides."""
    installed = Version(trl.__version__)
    if f"{installed.major}.{installed.minor}" != SUPPORTED_TRL:
        raise ImportError(
            f"IGPOTrainer overrides internals of TRL that are tested with trl {SUPPORTED_TRL}.x, got trl "
            f"{trl.__version__}. Install it with `pip install 'trl=={SUPPORTED_TRL}.*'`."
        )


def check_before_loading(
    args: Any,
    processing_class: Any,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Any,
    tools: Sequence[Callable[..., Any]] | None,
    environments: Any,
    *,
    needs_answers: bool,
) -> None:
    """
    Raise `ValueError` for whatever would make training fail, or train nothing, once the model is loaded.

    Args:
        args ([`IGPOConfig`]): configuration.
        processing_class (`PreTrainedTokenizerBase`): of the model.
        train_dataset, eval_dataset (*optional*): as the trainer got them.
        tools (list of `Callable`, *optional*), environments (*optional*): as the trainer got them.
        needs_answers (`bool`): whether the reward function reads the answers.
    """
    uses_tools = bool(tools or environments)
    check_processing_class(processing_class, uses_tools)
    if environments is None:  # otherwise the tools are known only once there is an environment
        check_tool_names(args.info_gain_tools, tools)
    if uses_tools and args.max_tool_response_tokens is not None:
        ObservationEncoder(processing_class, max_tokens=args.max_tool_response_tokens)  # raises if that is too few
    if args.uses_beliefs or needs_answers:
        check_answers(train_dataset, args.answer_column, "train_dataset")
    if train_dataset is not None and uses_tools:
        check_conversational(train_dataset)
    if needs_answers or args.belief_at_eval:
        for name, dataset in named_datasets(eval_dataset):
            check_answers(dataset, args.answer_column, name)


def check_processing_class(processing_class: Any, uses_tools: bool) -> None:
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"IGPOTrainer supports text models only, got the multi-modal processor {type(processing_class).__name__}. "
            "Pass the tokenizer of a text model as `processing_class`."
        )
    if uses_tools:
        prepare_for_tools(processing_class)


def check_rollout_output(extra_fields: dict[str, Any]) -> None:
    """Raise `ValueError` if TRL has not read the mask that a `rollout_func` returned."""
    if "env_mask" in extra_fields:
        raise ValueError(
            "`rollout_func` returned an `env_mask`, which is not read if the trainer has tools: they run after it, on "
            "turns that it left open. Leave out `tools` and `environment_factory`, or the mask."
        )


def check_trainable(model: Any) -> None:
    """Raise `ValueError` if all parameters of the model are frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"Training would change nothing: all parameters of this {type(model).__name__} are frozen. Load an "
            "adapter with `PeftModel.from_pretrained(..., is_trainable=True)`, or pass a `peft_config`."
        )


def check_conversational(dataset: Dataset | IterableDataset) -> None:
    row: dict[str, Any] = next(iter(dataset), {})
    if isinstance(row.get("prompt"), str):
        raise ValueError(
            "With tools, prompts must be lists of messages, got a string in row 0. Map the data set to "
            "`{'prompt': [{'role': 'user', 'content': question}]}`."
        )


def check_answers(dataset: Dataset | IterableDataset | None, column: str, name: str) -> None:
    """Raise `ValueError` if the column is missing or, in a map-style data set, a row holds no usable answer."""
    if dataset is None:
        raise ValueError(
            f"Information gain needs right answers: expected a `{name}` with the column `{column}`, got none. "
            "Pass one, also where an environment writes the prompt."
        )
    columns = dataset.column_names
    if columns is None:  # a stream that does not know its columns
        columns = list(next(iter(dataset), {}))
    if column not in columns:
        raise ValueError(
            f"Information gain needs right answers: `{name}` has no column `{column}`, got {', '.join(columns)}. Name "
            "yours with `IGPOConfig(answer_column=...)`."
        )
    if isinstance(dataset, Dataset):
        row = 0
        for block in dataset.select_columns([column]).with_format(None).iter(batch_size=10_000):
            for value in block[column]:
                answers_of({column: value}, column, where=f"row {row} of `{name}`")
                row += 1


def answers_of(row: dict[str, Any], column: str, where: str = "the batch") -> tuple[str, ...]:
    """The row's answers, stripped; raises `ValueError` for anything but non-empty strings."""
    value = row.get(column)
    answers: Sequence[Any] = (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(
            f"An answer must be a non-empty string or a non-empty list of such, got {value!r} in column `{column}`, "
            f"{where}. Drop or repair the row."
        )
    return tuple(answer.strip() for answer in answers)


def named_datasets(dataset: Any) -> list[tuple[str, Any]]:
    if dataset is None or isinstance(dataset, str):
        return []
    if isinstance(dataset, dict):
        return [(f"eval_dataset[{key!r}]", value) for key, value in dataset.items()]
    return [("eval_dataset", dataset)]


def environment_rewards(factory: Any) -> bool:
    """Whether an environment scores its own rollouts (`get_reward`)."""
    factories = list(factory.values()) if isinstance(factory, dict) else [factory] if factory else []
    return any(hasattr(f if isinstance(f, type) else f(), "get_reward") for f in factories)


def check_tool_names(wanted: Sequence[str] | None, tools: Iterable[Callable[..., Any]] | None) -> None:
    """Raise `ValueError` if `info_gain_tools` names a tool that the trainer does not have."""
    names = {tool.__name__ for tool in tools or ()}
    if unknown := set(wanted or ()) - names:
        raise ValueError(
            f"`info_gain_tools` names {', '.join(sorted(unknown))}, got the tools "
            f"{', '.join(sorted(names)) or 'none'}. Give names of this trainer's tools."
        )
