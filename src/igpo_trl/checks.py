"""Checks made before a model is loaded: what was got, what was expected, and how to fix it."""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, ProcessorMixin

from .data.rows import check_answers, check_columns, check_prompts, columns_of, plain_prompt
from .rollout.chat_templates import prepare_for_tools
from .rollout.observations import ObservationEncoder
from .tools import options_of
from .training.hub import check_can_push


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Raise `TypeError` unless every data set is a `Dataset` or `IterableDataset`."""
    for name, dataset in [("train_dataset", train_dataset), *named_datasets(eval_dataset)]:
        if dataset is None or isinstance(dataset, Dataset | IterableDataset):
            continue
        fix = "Make one, for example with `Dataset.from_list(rows)`."
        if isinstance(dataset, dict):
            fix = f"Pass one of its entries: {', '.join(map(repr, dataset)) or 'it has none'}."
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got {type(dataset).__name__}. {fix}")


def check_before_loading(
    args: Any,
    processing_class: Any,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Any,
    tools: Sequence[Callable[..., Any]] | None,
    environments: Sequence[Any],
    *,
    needs_answers: bool,
    model: Any,
    revision: str | None,
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
        model (`str` or `PreTrainedModel`): as the trainer got it, or the name of an adapter's base model.
        revision (`str`, *optional*): of the model.
    """
    check_sampling(args)
    check_num_questions(args, train_dataset)
    uses_tools = bool(tools or environments)
    check_processing_class(processing_class, uses_tools)
    if not environments:  # otherwise the tools are known only once there is an environment
        check_tool_names(args, tools)
    if uses_tools and args.max_tool_response_tokens is not None:
        ObservationEncoder(processing_class, max_tokens=args.max_tool_response_tokens)  # raises if that is too few
    owned = any(map(own_answers, environments))
    columns = [] if train_dataset is None else columns_of(train_dataset)
    if needs_answers and not args.credits_turns and not owned and args.answer_column not in columns:
        raise ValueError(
            "No reward: `reward_funcs` is not given, and the default, the F1 of the answer, needs right answers in "
            f"the column `{args.answer_column}` of `train_dataset`, got {', '.join(columns) or 'no data set'}. Pass "
            "`reward_funcs`, or name the column of the answers with `IGPOConfig(answer_column=...)`."
        )
    if args.credits_turns or needs_answers:
        check_answers(train_dataset, args.answer_column, "train_dataset", optional=owned)
    for name, dataset in named_datasets(train_dataset, "train_dataset") + named_datasets(eval_dataset):
        check_columns(dataset, name, needs_prompt=not environments)
        check_prompts(dataset, name, as_messages=uses_tools)
        # Records hold the answers, and an evaluation reports F1, wherever there are any.
        is_train = name == "train_dataset"
        reads_answers = args.save_trajectories if is_train else True
        needs_column = not is_train and (needs_answers or args.belief_at_eval)
        if needs_column or (reads_answers and args.answer_column in columns_of(dataset)):
            check_answers(dataset, args.answer_column, name, optional=owned)
    if isinstance(train_dataset, Dataset):
        check_room(args, processing_class, train_dataset, tools or (), context_before_loading(args, model, revision))
    check_can_push(args)  # last, because it makes the repository


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


def warn_of_single_turns() -> None:
    warnings.warn(
        "Neither `tools` nor `environment_factory` is given: every rollout is a single turn, which has no information "
        "gain, and training is plain GRPO. Pass `tools=[...]` to train an agent.",
        UserWarning,
        stacklevel=3,  # the caller of the trainer
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


def check_tool_names(args: Any, tools: Iterable[Callable[..., Any]] | None) -> None:
    """Raise `ValueError` if `info_gain_tools` or `stop_tools` names a tool that the trainer does not have."""
    names = {tool.__name__ for tool in tools or ()}
    for option in ("info_gain_tools", "stop_tools"):
        if unknown := set(getattr(args, option) or ()) - names:
            raise ValueError(
                f"`{option}` names {', '.join(sorted(unknown))}, got the tools {', '.join(sorted(names)) or 'none'}. "
                "Give names of this trainer's tools."
            )


def check_sampling(args: Any) -> None:
    """Raise `ValueError` for generation options that give several sequences, or others than samples, per rollout."""
    for name in ("num_beams", "num_return_sequences", "n", "best_of"):
        if (number := (args.generation_kwargs or {}).get(name)) not in (None, 1):
            raise ValueError(
                f"A turn is one sampled sequence, so `generation_kwargs[{name!r}]` must be 1, got {number!r}. Set "
                "`num_generations` for several rollouts per question."
            )


def check_num_questions(args: Any, dataset: Dataset | IterableDataset | None) -> None:
    """Raise `ValueError` if the data set has too few rows for one step: training would end after none."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} questions, and a step needs {needed}: {args.generation_batch_size} "
            f"rollouts, `num_generations={args.num_generations}` of each. Add questions, raise `num_generations`, or "
            "lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
        )


def check_room(
    args: Any, processing_class: Any, dataset: Dataset, tools: Sequence[Callable[..., Any]], context_length: int
) -> None:
    """
    Compare what rollouts are likely to need with what they may use, in tokens.

    The estimate is prompt + rounds · (turn + result) + turn. Prompts are rendered (a sample of the data set); a turn
    counts as 100 tokens, or `max_turn_length` if that is less; a result as the longest `max_words` of a tool, or
    `max_tool_response_tokens` if that is less or no tool says how long its results are. Without a limit of the turns,
    one round is asked for.

    Raises:
        `ValueError`: if a prompt alone fills the context. If the estimate alone does not fit, a `UserWarning` says
            what to raise.
    """
    rows = range(0, len(dataset), max(1, len(dataset) // 32))
    stored = dataset.select(rows).with_format(None)["prompt"][:] if "prompt" in dataset.column_names else []
    prompts = [plain_prompt(prompt) for prompt in stored]
    lengths = [len(render(processing_class, prompt, tools, args.chat_template_kwargs or {})) for prompt in prompts]
    prompt_length = max(lengths, default=0)
    if prompt_length >= context_length:
        raise ValueError(
            f"The prompt of row {rows[lengths.index(prompt_length)]} of `train_dataset` has {prompt_length} tokens, "
            f"which leaves no room in the model's context of {context_length} tokens. Shorten the prompts or the "
            "tools' descriptions, or use a model with a longer context."
        )
    words = max((options_of(tool).max_words or 0 for tool in tools), default=0)
    if not words and args.max_tool_response_tokens is None:
        return
    text = " ".join(str(prompt if isinstance(prompt, str) else prompt[-1].get("content", "")) for prompt in prompts)
    tokens_per_word = len(processing_class.encode(text)) / max(1, len(text.split()))
    turn = min(100, args.max_turn_length or sys.maxsize)
    result = round(words * max(1.3, tokens_per_word)) or sys.maxsize
    result = min(result, args.max_tool_response_tokens or sys.maxsize)
    limits = [args.max_turns and args.max_turns - 1, args.max_tool_calling_iterations]
    rounds = min((limit for limit in limits if limit is not None), default=1)
    needed = rounds * (turn + result) + turn
    estimate = (
        f"{rounds} round{'s' * (rounds != 1)} of a turn (about {turn} tokens) and a tool's result (about {result}), "
        f"and an answer need about {needed} tokens"
    )
    remedy = "Rollouts that reach the limit end without an answer."
    cheaper = "show fewer or shorter passages, or lower `max_tool_response_tokens` or `max_turns`."
    if needed > (args.max_completion_length or sys.maxsize):
        warnings.warn(
            f"{estimate}, and `max_completion_length` is {args.max_completion_length}. {remedy} Raise it, {cheaper}",
            UserWarning,
            stacklevel=3,
        )
    elif prompt_length + needed > context_length:
        warnings.warn(
            f"{estimate} after a prompt of {prompt_length}, and the context is {context_length} tokens long. {remedy} "
            f"Use a model (or `vllm_max_model_length`) with a longer context, {cheaper}",
            UserWarning,
            stacklevel=3,
        )


def context_before_loading(args: Any, model: Any, revision: str | None = None) -> int:
    """Longest context of a model that may not be loaded yet, in tokens."""
    try:
        config = AutoConfig.from_pretrained(
            model, revision=revision or "main", trust_remote_code=args.trust_remote_code
        ) if isinstance(model, str) else model.config  # fmt: skip
    except (OSError, ValueError):  # loading the model says better what is wrong
        return sys.maxsize
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None)]
    limits += [args.vllm_max_model_length] if args.use_vllm else []
    return min((limit for limit in limits if limit), default=sys.maxsize)


def render(processing_class: Any, prompt: Any, tools: Sequence[Callable[..., Any]], options: dict[str, Any]) -> Any:
    """Token ids of a prompt, as the trainer renders it."""
    if isinstance(prompt, str):
        return processing_class.encode(prompt)
    return processing_class.apply_chat_template(
        prompt, tools=list(tools) or None, add_generation_prompt=True, return_dict=False, **options
    )


def refuse_images(images: Any) -> None:
    """Raise a `ValueError` if a prompt or a tool has brought images."""
    if images:
        raise ValueError("IGPOTrainer supports text only, got prompts with images.")
