"""Checks made before a model is loaded: what was got, what was expected, and how to fix it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from transformers import ProcessorMixin
from trl.chat_template_utils import supports_tool_calling

from .data.rows import check_answers, check_columns, check_prompts, columns_of
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
    for name, dataset in named_datasets(train_dataset, "train_dataset") + named_datasets(eval_dataset):
        check_columns(dataset, name, needs_prompt=not environments)
        check_prompts(dataset, name, as_messages=uses_tools)
        # Records hold the answers, and an evaluation reports F1, wherever there are any.
        is_train = name == "train_dataset"
        reads_answers = args.save_trajectories if is_train else True
        needs_column = not is_train and (needs_answers or args.belief_at_eval)
        if needs_column or (reads_answers and args.answer_column in columns_of(dataset)):
            check_answers(dataset, args.answer_column, name)


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


def named_datasets(dataset: Any, name: str = "eval_dataset") -> list[tuple[str, Any]]:
    if dataset is None or isinstance(dataset, str):
        return []
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", value) for key, value in dataset.items()]
    return [(name, dataset)]


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
