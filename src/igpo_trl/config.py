"""Arguments of [`IGPOTrainer`]: those of TRL's `GRPOConfig`, and the ones that IGPO adds."""

import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import GRPOConfig

from .beliefs.probes import DEFAULT_TEMPLATE
from .rewards import DEFAULT_FORMAT_PENALTY
from .training.options import Secret, check_numbers, check_options
from .turns import FIRST_SEEN

# TRL calls a property of transformers by its old name.
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

_AUTHORS = {"info_gain_weight": 1.0, "gamma": 1.0, "alias_reduction": "first", "std_floor": 1e-4}
#: What arXiv 2510.14967 and its reference code set, by `recipe`.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"info_gain": "log_prob_diff", "normalization": "separate", **_AUTHORS},
    "preprint": {"info_gain": "prob_diff", "normalization": "joint", **_AUTHORS},
}


@dataclass
class IGPOConfig(GRPOConfig):
    r"""
    Configuration of [`IGPOTrainer`].

    Every parameter of `trl.GRPOConfig` is inherited with its default. `scale_rewards` keeps its meaning: `"group"`
    divides by the standard deviation of the pool in the group, `"batch"` by that of the batch, `"none"` by nothing.
    Each field's help says where its default comes from; "paper" is arXiv 2510.14967.
    """

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Set what the paper and its reference code set: `paper`, the published version (gains in "
            "log-probability, normalised apart from the outcomes), or `preprint`, the first version (gains in "
            "probability, normalised together with them). Both score the first alias, and have a `std_floor` of 1e-4. "
            "Options with another value than their default keep it."
        },
    )

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
            "help": "Gain of a turn: `prob_diff`, the difference of probabilities (the paper's preprint), "
            "`log_prob_diff`, that of log-probabilities (its published version), or `log_gap`, the factor by which "
            "the gap to certainty shrinks, as a logarithm: bounded, and not blind to beliefs of 1e-6. `first_seen` is "
            "1 for the turn whose observation is the first to contain an answer, else 0; it needs no belief."
        },
    )
    gain_baseline: str = field(
        default="previous",
        metadata={
            "help": "What the belief after a turn is compared with: `previous`, the belief before the turn; or "
            "`random`, the belief after the same turn if it had found what a search for another question of the batch "
            "found (IG-Search, arXiv 2604.15148), which takes a forward for every turn."
        },
    )
    gain_clip: float | None = field(
        default=None, metadata={"help": "Largest absolute gain; what is beyond it counts as this. `None` is no limit."}
    )
    info_gain_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the gains, after normalisation. `None` is 1.0 (paper), and 0.0 with "
            "`normalization='critic'` and gains other than `prob_diff`: the critic adds gains to the outcome as they "
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
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "`critic`: what follows a turn, less a value fitted per batch from the belief, with generalised "
            "advantages over turns. `returns`: what follows a turn, less its mean over the others of the group that "
            "have this turn. `joint`: gains and outcomes share mean and std in the group (preprint, Eq. 6). "
            "`separate`: each has its own (published version). `per_turn`: gains are compared at the same turn index "
            "(A2TGPO, arXiv 2605.06200). The last three subtract a mean from the reward of every turn, so a turn has "
            "a price of its own and the gradient is biased. `None` is `critic`; `returns` with `info_gain_every`, "
            "`info_gain_tools` or `info_gain='first_seen'`; and GRPO with `info_gain_weight=0`."
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

    # Outcome, of the default reward function
    answer_metric: str = field(
        default="f1",
        metadata={
            "help": "Outcome of an answer: `f1` (paper), or `em`, exact match, which pays nothing for words that the "
            "question and the right answer share; see the signature `question_echo` of `igpo doctor`."
        },
    )
    format_penalty: float = field(
        default=DEFAULT_FORMAT_PENALTY,
        metadata={
            "help": "Outcome of a rollout whose last turn has no well-formed answer, on the scale of F1 (0 to 1). "
            "-2.0 in the reference code."
        },
    )

    # Belief pass
    belief_model: str = field(
        default="policy",
        metadata={
            "help": "Whose belief is scored: `policy`; `reference`, the model that training starts from (the adapter "
            "switched off, or the reference model of `beta`); or `snapshot`, the policy of up to "
            "`belief_snapshot_steps` optimizer steps ago. The last two take a forward over the rollouts of their own."
        },
    )
    belief_snapshot_steps: int = field(
        default=50, metadata={"help": "Optimizer steps between two snapshots, with `belief_model='snapshot'`."}
    )
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
    stop_tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tools whose call ends the rollout, such as `['final_answer']`, which `igpo train` and `igpo "
            "eval` add to the search. The argument `answer` of the call, or its only text, is the answer, as if it "
            "stood inside `<answer>` and `</answer>`."
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
    pad_to_longest: bool | None = field(
        default=None,
        metadata={
            "help": "Train as TRL does: all rows padded to the longest prompt and completion of the batch, and the "
            "output head run on observations too. With `False` only real tokens are computed, and the head at sampled "
            "ones; the loss is the same up to rounding. `None` pads only where gains have no weight, so that GRPO is "
            "TRL's bit for bit."
        },
    )
    reuse_prefixes: bool = field(
        default=True,
        metadata={"help": "Keep the KV cache of rollouts between turns (transformers backend, if it can be cropped)."},
    )

    # Diagnosis
    evidence_every: int | None = field(
        default=None,
        metadata={
            "help": "Every so many optimizer steps, log `evidence/used`: how much less likely the next turns are "
            "without the observations that they follow. Takes two forwards for every turn. `None` never does."
        },
    )

    # Records
    save_trajectories: bool = field(
        default=False,
        metadata={
            "help": "Write every training rollout with its beliefs, gains and advantages to "
            "`output_dir/trajectories/` as JSON Lines, one file per process, which continues in another after 64 MiB. "
            "Resumed training removes those of steps that it repeats; a new run moves them to `trajectories-1`."
        },
    )

    def __post_init__(self) -> None:
        # transformers' new name of an option that TRL sets by its old name, which warns.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        self._check_bf16()
        if self.recipe is not None:
            if self.recipe not in RECIPES:
                raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {self.recipe!r}.")
            defaults = {field.name: field.default for field in fields(self)}
            for name, value in RECIPES[self.recipe].items():
                if getattr(self, name) == defaults[name]:
                    setattr(self, name, value)
        check_numbers(self)
        super().__post_init__()
        if self.normalization is None:
            wants_grpo = self.info_gain_weight == 0 and not self.info_gain_weight_end
            no_critic = self.info_gain_every > 1 or self.info_gain_tools is not None or self.info_gain == FIRST_SEEN
            self.normalization = "separate" if wants_grpo else "returns" if no_critic else "critic"
        if self.info_gain_weight is None:
            on_own_scale = self.normalization == "critic" and self.info_gain != "prob_diff"
            self.info_gain_weight = 0.0 if on_own_scale else 1.0
        check_options(self)
        if token := getattr(self, "hub_token"):  # noqa: B009  # whose type mypy does not find
            self.hub_token = Secret(token)

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
    def credits_turns(self) -> bool:
        """Whether turns have advantages of their own; if not, the advantages are GRPO's."""
        return self.normalization == "critic" or any((self.info_gain_weight, self.info_gain_weight_end))

    @property
    def uses_beliefs(self) -> bool:
        """Whether training scores beliefs."""
        return self.credits_turns and (self.normalization == "critic" or self.info_gain != FIRST_SEEN)

    @property
    def pads_to_longest(self) -> bool:
        """`pad_to_longest`, or what it is by default."""
        return not self.credits_turns if self.pad_to_longest is None else self.pad_to_longest

    def weights_at(self, progress: float) -> tuple[float, float]:
        """Weights of the gains and of the outcome at a training progress between 0 and 1."""

        def at(start: float, end: float | None) -> float:
            return start if end is None else start + (end - start) * min(max(progress, 0.0), 1.0)

        assert self.info_gain_weight is not None  # resolved in __post_init__
        return at(self.info_gain_weight, self.info_gain_weight_end), at(self.outcome_weight, self.outcome_weight_end)
