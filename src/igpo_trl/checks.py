"""Checks made before a model is loaded: what was got, what was expected, and how to fix it."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from transformers import ProcessorMixin
from trl.chat_template_utils import supports_tool_calling

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
    environments: Sequence[Any],
    *,
    needs_answers: bool,
) -> None:
    """
    Raise `ValueError` for whatever would make training fail, or train nothing, once the model is loaded.

    Args:
        args ([`IGPOConfig`]): configuration.
        processing_class (`PreTrainedTokenizerBase`): of the model.
        train_dataset, eval_dataset (*optional*): as the trainer got them.
        tools (list of `Callable`, *optional*): as the trainer got them.
        environments (list): one of each kind.
        needs_answers (`bool`): whether the reward function reads the answers.
    """
    uses_tools = bool(tools or environments)
    check_processing_class(processing_class, uses_tools)
    if not environments:  # otherwise the tools are known only once there is an environment
        check_tool_names(args.info_gain_tools, tools)
    if uses_tools and args.max_tool_response_tokens is not None:
        ObservationEncoder(processing_class, max_tokens=args.max_tool_response_tokens)  # raises if that is too few
    owned = any(map(own_answers, environments))
    if args.uses_beliefs or needs_answers:
        check_answers(train_dataset, args.answer_column, "train_dataset", optional=owned)
    if train_dataset is not None and uses_tools:
        check_conversational(train_dataset)
    if needs_answers or args.belief_at_eval:
        for name, dataset in named_datasets(eval_dataset):
            check_answers(dataset, args.answer_column, name, optional=owned)


def check_processing_class(processing_class: Any, uses_tools: bool) -> None:
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"IGPOTrainer supports text models only, got the multi-modal processor {type(processing_class).__name__}. "
            "Pass the tokenizer of a text model as `processing_class`."
        )
    if not uses_tools:
        return
    if processing_class.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, which tool calls are rendered with. Use an instruction-tuned model, "
            "or set `tokenizer.chat_template`."
        )
    if not supports_tool_calling(processing_class):
        raise ValueError(
            "The tokenizer's chat template cannot call tools: it does not render an assistant's tool call and the "
            "tool's answer. Use a model that was trained to call tools (Qwen2.5, Qwen3, Llama 3.1, …), or another "
            "`tokenizer.chat_template`."
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


def check_answers(
    dataset: Dataset | IterableDataset | None, column: str, name: str, *, optional: bool = False
) -> None:
    """
    Raise `ValueError` if the column is missing or, in a map-style data set, a row holds no usable answer.

    With `optional`, environments own the answers that are not there.
    """
    if dataset is None and optional:
        return
    if dataset is None:
        raise ValueError(
            f"Information gain needs right answers: expected a `{name}` with the column `{column}`, got none. "
            "Pass one, or let the environment own them in an attribute `answers`."
        )
    columns = dataset.column_names
    if columns is None:  # a stream that does not know its columns
        columns = list(next(iter(dataset), {}))
    if column not in columns and optional:
        return
    if column not in columns:
        raise ValueError(
            f"Information gain needs right answers: `{name}` has no column `{column}`, got {', '.join(columns)}. Name "
            "yours with `IGPOConfig(answer_column=...)`, or let the environment own them in an attribute `answers`."
        )
    if isinstance(dataset, Dataset):
        row = 0
        for block in dataset.select_columns([column]).with_format(None).iter(batch_size=10_000):
            for value in block[column]:
                if not (optional and value is None):
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


def probe_environments(factory: Any) -> tuple[Any, list[Any]]:
    """
    One environment of each factory, and factories that give it out first, so that none is made in vain.

    Args:
        factory (`Callable` or `dict` of them, *optional*): what TRL calls `environment_factory`.
    """
    if not factory:
        return factory, []
    if isinstance(factory, dict):
        probes = {name: probe_environments(each) for name, each in factory.items()}
        return {name: each for name, (each, _) in probes.items()}, [one for _, (one,) in probes.values()]
    unused = [factory()]
    return lambda: unused.pop() if unused else factory(), list(unused)


def own_answers(environment: Any) -> bool:
    """Whether an environment has an attribute or a property `answers`, set or declared. (A method is a tool.)"""
    missing = object()
    own = inspect.getattr_static(environment, "answers", missing)
    declared = any("answers" in inspect.get_annotations(kind) for kind in type(environment).__mro__)
    return declared if own is missing else not inspect.isroutine(own)


def check_tool_names(wanted: Sequence[str] | None, tools: Iterable[Callable[..., Any]] | None) -> None:
    """Raise `ValueError` if `info_gain_tools` names a tool that the trainer does not have."""
    names = {tool.__name__ for tool in tools or ()}
    if unknown := set(wanted or ()) - names:
        raise ValueError(
            f"`info_gain_tools` names {', '.join(sorted(unknown))}, got the tools "
            f"{', '.join(sorted(names)) or 'none'}. Give names of this trainer's tools."
        )
