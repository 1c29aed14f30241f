"""Arguments of [`IGPOTrainer`]: those of TRL's `GRPOConfig`, and the ones that IGPO adds."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import GRPOConfig

from .advantages import NORMALIZATIONS
from .beliefs.probes import DEFAULT_TEMPLATE, split_template
from .rewards import DEFAULT_FORMAT_PENALTY

# TRL calls a property of transformers by its old name.
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

#: The losses that TRL computes; it looks at the name only in the first step.
_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")

#: Numbers of TRL and transformers that fail only after the model is loaded, or mean nothing, and their least values.
_SMALLEST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_completion_length", "num_generations", "num_generations_eval", "num_iterations"), 1),
    **dict.fromkeys(("learning_rate", "temperature", "warmup_steps", "beta", "max_grad_norm"), 0),
}


@dataclass
class IGPOConfig(GRPOConfig):
    r"""
    Configuration of [`IGPOTrainer`].

    Every parameter of `trl.GRPOConfig` is inherited with its default. `scale_rewards` keeps its meaning: `"group"`
    divides by the standard deviation of the pool in the group, `"batch"` by that of the batch, `"none"` by nothing.
    Each field's help says where its default comes from; "paper" is arXiv 2510.14967.
    """

    # Answers
    answer_column: str = field(
        default="answers",
        metadata={"help": "Dataset column with the right answers: a string, or a list of strings (aliases)."},
    )
    answer_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": "Text in which the answer is scored, with one `{answer}` slot; only its own tokens count. The "
            "default is the template of the paper's reference code; `igpo_trl.beliefs.NO_THINK_TEMPLATE` is the form "
            "for models that do not think aloud. Whatever the generation prompt has already opened is left out."
        },
    )
    alias_reduction: str = field(
        default="max",
        metadata={
            "help": "How the beliefs in several aliases become one, per context: `max`, `mean` (of the probabilities) "
            "or `first`. The reference code scores the first alias only."
        },
    )

    # Information gain
    info_gain: str = field(
        default="prob_diff",
        metadata={
            "help": "Gain of a turn: `prob_diff`, the difference of probabilities (paper), or `log_prob_diff`, the "
            "difference of log-probabilities (the authors' later runs)."
        },
    )
    info_gain_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the gains, after normalisation. `None` is 1.0 (paper), and 0.0 with "
            "`normalization='critic'` and `info_gain='log_prob_diff'`: the critic adds gains to the outcome as they "
            "are, and those in nats would outweigh it. With 0 in the other modes no belief is scored and the "
            "advantages are GRPO's, unchanged."
        },
    )
    info_gain_weight_end: float | None = field(
        default=None,
        metadata={"help": "If set, the weight of the gains changes linearly to this value over training."},
    )
    outcome_weight: float = field(
        default=1.0, metadata={"help": "Weight of the outcome, after normalisation. 1.0 in the paper."}
    )
    outcome_weight_end: float | None = field(
        default=None,
        metadata={"help": "If set, the weight of the outcome changes linearly to this value over training."},
    )

    info_gain_every: int = field(
        default=1,
        metadata={
            "help": "Number of turns over which one gain is measured; it is the reward of the last of them. More than "
            "one makes the belief pass cheaper on long horizons, and the credit coarser."
        },
    )
    info_gain_tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Only turns that call one of these tools get a gain, such as `['search']` if a calculator says "
            "nothing about the answer. `None` is every turn but the last."
        },
    )

    # Advantages
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "Level of the importance sampling ratios: `token`, or `turn`, the geometric mean over the tokens "
            "of a turn, as GSPO's is over a sequence. `sequence` is refused if turns have advantages of their own: "
            "one ratio times every token's advantage leaves their sum only."
        },
    )
    normalization: str = field(
        default="separate",
        metadata={
            "help": "`joint`: gains and outcomes share mean and std in the group (paper, Eq. 6). `separate`: each has "
            "its own (the authors' training script). `per_turn`: gains are compared at the same turn index (A2TGPO, "
            "arXiv 2605.06200). These three subtract a mean from the reward of every turn, so a turn has a price of "
            "its own and the gradient is biased. The others are not: `returns` takes what follows a turn, less its "
            "mean over the other rollouts of the group that have this turn; `critic` takes it less a value fitted per "
            "batch from the belief, with generalised advantages over turns."
        },
    )
    gamma: float = field(
        default=1.0, metadata={"help": "Discount per turn (not per token) of the rewards that follow (paper)."}
    )
    gae_lambda: float = field(
        default=0.9,
        metadata={
            "help": "Lambda of generalised advantage estimation; read with `critic` only. Smaller is less noisy, and "
            "biased where the belief does not see progress."
        },
    )
    std_floor: float = field(
        default=1e-2,
        metadata={
            "help": "Smallest standard deviation to divide by, in units of the reward, so that differences of 1e-4 "
            "between beliefs are not blown up to unit scale. The reference code uses about 1e-4."
        },
    )

    # Outcome
    format_penalty: float = field(
        default=DEFAULT_FORMAT_PENALTY,
        metadata={
            "help": "Outcome of a rollout whose last turn has no well-formed answer, on the scale of F1 (0 to 1). "
            "Used by the default reward function only. -2.0 in the reference code."
        },
    )

    # Belief pass
    belief_method: str = field(
        default="auto",
        metadata={
            "help": "`packed`: the trajectory once, then all probes against its KV cache. `per_turn`: one sequence "
            "per turn. `auto`: packed where it is exact on this model and agrees with plain forwards on the first "
            "batch."
        },
    )
    belief_tokens_per_batch: int = field(
        default=16_384,
        metadata={
            "help": "Tokens per forward of the belief pass, padding included. This bounds its memory; a single "
            "rollout or probe may be longer."
        },
    )
    max_answer_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer that beliefs score, in tokens: of a longer one only the first tokens count. "
            "`None` is no limit."
        },
    )

    belief_at_eval: bool = field(
        default=False,
        metadata={"help": "Also score beliefs in evaluation, and log `eval_belief/*` and `eval_info_gain/*`."},
    )

    # Rollout
    max_completion_length: int | None = field(
        default=4096,
        metadata={
            "help": "Tokens of a whole rollout after its prompt: all turns and all observations. TRL's default of 512 "
            "leaves no room for one search of three passages."
        },
    )
    max_turns: int | None = field(
        default=None,
        metadata={
            "help": "Turns of a rollout, the answer included; `None` is no limit. `forced_answer` adds one more. "
            "TRL's `max_tool_calling_iterations` limits the rounds of tool calls, and both apply."
        },
    )
    max_turn_length: int | None = field(
        default=None,
        metadata={
            "help": "Sampled tokens of one turn. `None` is `max_completion_length`, the limit of a whole rollout "
            "including its observations."
        },
    )
    max_tool_response_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of one tool result; a longer one is cut between two tokens and ends in a marker that says "
            "so. `None` is no limit; a result that leaves no room for another turn then ends the rollout."
        },
    )
    forced_answer: bool = field(
        default=False,
        metadata={
            "help": "Whether a rollout that reaches a limit is asked to answer after its last observation, and gets "
            "one last turn without tools."
        },
    )
    forced_answer_prompt: str = field(
        default="You cannot call any more tools. Give your final answer now.",
        metadata={
            "help": "The user message that asks for it. Its tokens are an observation and are never trained on."
        },
    )
    forced_answer_length: int = field(
        default=64,
        metadata={
            "help": "Tokens kept free for a forced answer; tool results are cut to make that room. At most an eighth "
            "of `max_completion_length`."
        },
    )
    on_malformed_tool_call: str = field(
        default="observe",
        metadata={
            "help": "What follows a tool call that cannot be read: `observe`, a tool result that says what was wrong, "
            "or `end`, the end of the rollout, as in TRL."
        },
    )
    max_concurrent_tool_calls: int = field(
        default=64,
        metadata={
            "help": "Tool calls that run at the same time, per process. Use 1 for tools that are not thread-safe."
        },
    )
    tool_timeout: float | None = field(
        default=60.0,
        metadata={
            "help": "Seconds after which a tool call is abandoned, retries included; the policy then reads an error. "
            "`None` is no limit."
        },
    )
    max_tool_failures: float | None = field(
        default=0.5,
        metadata={
            "help": "Share of one tool's calls in a batch that may fail for want of its service (connection errors, "
            "timeouts; not wrong arguments). From this share on in `tool_failure_patience` batches in a row, training "
            "stops with an error. `None` never stops."
        },
    )
    tool_failure_patience: int = field(
        default=3, metadata={"help": "Batches in a row with that share of failed calls after which training stops."}
    )
    pad_to_longest: bool = field(
        default=True,
        metadata={
            "help": "Train as TRL does: all rows padded to the longest prompt and completion of the batch, and the "
            "output head run on observations too. With `False` only real tokens are computed, and the head at sampled "
            "ones; the loss is the same up to rounding."
        },
    )
    reuse_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Whether the transformers backend keeps the KV cache of a rollout between its turns, if the "
            "model's cache can be cropped."
        },
    )

    # Records
    save_trajectories: bool = field(
        default=False,
        metadata={
            "help": "Write every training rollout with its beliefs, gains and advantages to "
            "`output_dir/trajectories/` as JSON Lines, one file per process. Resumed training removes the records of "
            "the steps that it repeats; a new run in the same directory moves those of the earlier one to "
            "`trajectories-1`."
        },
    )

    def __post_init__(self) -> None:
        # transformers' new name of an option that TRL sets by its old name, which warns.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        self._check_bf16()
        for name, low in _SMALLEST.items():
            if (number := getattr(self, name)) is not None and number < low:
                raise ValueError(f"`{name}` must be at least {low}, got {number}.")
        super().__post_init__()
        self._check_choice("loss_type", _LOSSES)
        self._check_choice("scale_rewards", ("group", "batch", "none"))
        self._check_choice("alias_reduction", ("max", "mean", "first"))
        self._check_choice("info_gain", ("prob_diff", "log_prob_diff"))
        self._check_choice("normalization", NORMALIZATIONS)
        self._check_choice("belief_method", ("auto", "packed", "per_turn"))
        self._check_choice("on_malformed_tool_call", ("observe", "end"))
        for name in (
            "belief_tokens_per_batch", "max_answer_tokens", "max_turns", "max_turn_length", "forced_answer_length",
            "max_concurrent_tool_calls", "info_gain_every", "tool_failure_patience",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.tool_timeout is not None and self.tool_timeout <= 0:
            raise ValueError(f"`tool_timeout` must be positive, or `None` for no limit, got {self.tool_timeout}.")
        if self.max_tool_failures is not None and not 0.0 < self.max_tool_failures <= 1.0:
            raise ValueError(
                f"`max_tool_failures` must be a share above 0 and at most 1, or `None`, got {self.max_tool_failures}."
            )
        if self.forced_answer and not self.forced_answer_prompt.strip():
            raise ValueError("`forced_answer=True` needs a `forced_answer_prompt`, got an empty one.")
        split_template(self.answer_template)
        if self.info_gain_weight is None:
            in_nats = self.info_gain == "log_prob_diff"
            self.info_gain_weight = 0.0 if self.normalization == "critic" and in_nats else 1.0
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        tools: Any = self.info_gain_tools
        if tools is not None and (isinstance(tools, str) or not tools):
            raise ValueError(f"`info_gain_tools` must be a list of tool names, or `None` for all, got {tools!r}.")
        if self.normalization == "critic" and (self.info_gain_every > 1 or self.info_gain_tools is not None):
            raise ValueError(
                "`normalization='critic'` reads the belief before every turn, so `info_gain_every` must be 1 and "
                f"`info_gain_tools` None, got {self.info_gain_every} and {self.info_gain_tools!r}."
            )
        if self.std_floor < 0:
            raise ValueError(f"`std_floor` must not be negative, got {self.std_floor}.")
        self._check_choice("importance_sampling_level", ("token", "turn", "sequence"))
        if self.uses_beliefs and self.importance_sampling_level == "sequence":
            raise ValueError(
                "With one ratio per sequence the gradient depends on the sum of a rollout's advantages only, "
                "and the credit of its turns is lost: `importance_sampling_level` must be 'token' or 'turn', got "
                "'sequence'."
            )
        if self.importance_sampling_level == "turn" and self.loss_type == "vespo":
            raise ValueError(
                "`loss_type='vespo'` computes weights of sequences itself, so `importance_sampling_level` must be "
                "'token', got 'turn'. Leave it at 'token', or choose another `loss_type`."
            )
        if self.multi_objective_aggregation != "sum_then_normalize" and self.uses_beliefs:
            raise ValueError(
                "IGPO normalises the summed outcome itself, so `multi_objective_aggregation` must be "
                f"'sum_then_normalize', got {self.multi_objective_aggregation!r}. Weight the reward functions with "
                "`reward_weights` instead."
            )

    def _check_bf16(self) -> None:
        """Train in float32 where nothing computes in bfloat16, unless bfloat16 was asked for."""
        bf16: bool | None = getattr(self, "bf16")  # noqa: B009  # `None` until TRL decides
        if self.use_cpu or self.fp16 or is_torch_bf16_gpu_available() or is_torch_xla_available():
            return
        if bf16:
            raise ValueError(
                "`bf16=True` needs a GPU that computes in bfloat16, and there is none. Set `bf16=False` to train in "
                "float32, and `use_cpu=True` to train on the CPU."
            )
        if bf16 is None:
            self.bf16 = False

    @property
    def uses_beliefs(self) -> bool:
        """Whether training scores beliefs at all; if not, the advantages are GRPO's."""
        return self.normalization == "critic" or any((self.info_gain_weight, self.info_gain_weight_end))

    def weights_at(self, progress: float) -> tuple[float, float]:
        """Weights of the gains and of the outcome at a training progress between 0 and 1."""

        def at(start: float, end: float | None) -> float:
            return start if end is None else start + (end - start) * min(max(progress, 0.0), 1.0)

        assert self.info_gain_weight is not None  # resolved in __post_init__
        return at(self.info_gain_weight, self.info_gain_weight_end), at(self.outcome_weight, self.outcome_weight_end)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
