"""Which values the options of a training run may have."""

from typing import Any

from ..advantages import NORMALIZATIONS
from ..beliefs.probes import split_template
from ..turns import FIRST_SEEN, GAINS

_CHOICES = {
    # TRL looks at the name only in the first step.
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "answer_metric": ("f1", "em"),
    "alias_reduction": ("max", "mean", "first"),
    "info_gain": (*GAINS, FIRST_SEEN),
    "normalization": NORMALIZATIONS,
    "gain_baseline": ("previous", "random"),
    "belief_model": ("policy", "reference", "snapshot"),
    "belief_method": ("auto", "packed", "per_turn"),
    "on_malformed_tool_call": ("observe", "end"),
    "importance_sampling_level": ("token", "turn", "sequence"),
}

#: Numbers of TRL and transformers that fail only after the model is loaded, or mean nothing, and their least values.
_SMALLEST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_completion_length", "num_generations", "num_generations_eval", "num_iterations"), 1),
    **dict.fromkeys(("learning_rate", "temperature", "warmup_steps", "beta", "max_grad_norm"), 0),
}


def check_numbers(config: Any) -> None:
    """Raise `ValueError` if a number of TRL or transformers is too small; it comes before their own checks."""
    for name, low in _SMALLEST.items():
        if (number := getattr(config, name)) is not None and number < low:
            raise ValueError(f"`{name}` must be at least {low}, got {number}.")


def check_options(config: Any) -> None:
    """Raise `ValueError` if an option of an [`IGPOConfig`] means nothing, or two of them contradict each other."""
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    for name in (
        "belief_tokens_per_batch", "max_answer_tokens", "max_turns", "max_turn_length", "forced_answer_length",
        "max_concurrent_tool_calls", "info_gain_every", "tool_failure_patience",
        "belief_snapshot_steps", "evidence_every",
    ):  # fmt: skip
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    for name in ("tool_timeout", "gain_clip"):
        if (value := getattr(config, name)) is not None and value <= 0:
            raise ValueError(f"`{name}` must be positive, or `None` for no limit, got {value}.")
    if config.max_tool_failures is not None and not 0.0 < config.max_tool_failures <= 1.0:
        raise ValueError(
            f"`max_tool_failures` must be a share above 0 and at most 1, or `None`, got {config.max_tool_failures}."
        )
    if config.forced_answer and not config.forced_answer_prompt.strip():
        raise ValueError("`forced_answer=True` needs a `forced_answer_prompt`, got an empty one.")
    split_template(config.answer_template)
    for name in ("gamma", "gae_lambda"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(config, name)}.")
    for name, without in (("info_gain_tools", "all"), ("stop_tools", "none")):
        tools = getattr(config, name)
        if tools is not None and (isinstance(tools, str) or not tools):
            raise ValueError(f"`{name}` must be a list of tool names, or `None` for {without}, got {tools!r}.")
    if config.normalization == "critic" and (config.info_gain_every > 1 or config.info_gain_tools is not None):
        raise ValueError(
            "`normalization='critic'` reads the belief before every turn, so `info_gain_every` must be 1 and "
            f"`info_gain_tools` None, got {config.info_gain_every} and {config.info_gain_tools!r}."
        )
    if config.gain_baseline == "random" and (config.info_gain_every > 1 or config.info_gain == FIRST_SEEN):
        raise ValueError(
            "`gain_baseline='random'` compares beliefs after single turns, so `info_gain_every` must be 1 and "
            f"`info_gain` a rise of the belief, got {config.info_gain_every} and {config.info_gain!r}."
        )
    if config.std_floor < 0:
        raise ValueError(f"`std_floor` must not be negative, got {config.std_floor}.")
    if config.credits_turns and config.importance_sampling_level == "sequence":
        raise ValueError(
            "With one ratio per sequence the gradient depends on the sum of a rollout's advantages only, "
            "and the credit of its turns is lost: `importance_sampling_level` must be 'token' or 'turn', got "
            "'sequence'."
        )
    if config.importance_sampling_level == "turn" and config.loss_type == "vespo":
        raise ValueError(
            "`loss_type='vespo'` computes weights of sequences itself, so `importance_sampling_level` must be "
            "'token', got 'turn'. Leave it at 'token', or choose another `loss_type`."
        )
    if config.multi_objective_aggregation != "sum_then_normalize" and config.credits_turns:
        raise ValueError(
            "IGPO normalises the summed outcome itself, so `multi_objective_aggregation` must be "
            f"'sum_then_normalize', got {config.multi_objective_aggregation!r}. Weight the reward functions with "
            "`reward_weights` instead."
        )


class Secret(str):
    """
    A token that is not pickled: transformers pickles its arguments into `training_args.bin`, which is uploaded.

    Raises `ValueError` for a text that no HTTP header can have, because the error of the HTTP client would show it.
    """

    def __new__(cls, token: str) -> "Secret":
        token = token.strip()
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("`hub_token` has a space, a line break or a letter that no token has. Copy it again.")
        return super().__new__(cls, token)

    def __repr__(self) -> str:
        return "'<secret>'"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: Any) -> "Secret":
        return self
