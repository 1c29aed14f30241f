"""What every metric of a training run means: the one table, from which docs/metrics.md is made. Needs no torch."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """
    A metric, or a family of them.

    Attributes:
        name (`str`): as it is logged; a part in angle brackets, such as `<kind>`, stands for any text.
        meaning (`str`): what it is, as Markdown.
        healthy (`str`): which values are healthy; empty where any value is.
        remedy (`str`): what to do when it is not; empty where there is nothing to do.
    """

    name: str
    meaning: str
    healthy: str = ""
    remedy: str = ""

    def matches(self, name: str) -> bool:
        """Whether this describes a metric, without the prefix of an evaluation."""
        pattern = "".join("(.+)" if part.startswith("<") else re.escape(part) for part in _PARTS.split(self.name))
        return re.fullmatch(pattern, name) is not None


_PARTS = re.compile(r"(<[^>]+>)")

#: By title of their section, in the order of the page.
METRICS: Mapping[str, tuple[Metric, ...]] = {
    "Rewards": (
        Metric(
            "reward",
            "mean outcome: the weighted sum of the reward functions",
            "rising; noisy from step to step, because each has other questions",
            "if it does not rise for hundreds of steps, look at `collapse/advantage`, then at rollouts (`igpo view`)",
        ),
        Metric(
            "reward_std",
            "standard deviation of the outcome over the batch",
            "above 0",
            "see `collapse/outcome`",
        ),
        Metric(
            "rewards/<function>/mean",
            "mean of one reward function; with `answer_reward`, the F1 of the answer less the penalty for its format",
            "rising",
            "below 0 with `answer_reward`: most rollouts have no well-formed answer, see `rollout/stop/<reason>`",
        ),
        Metric("rewards/<function>/std", "its standard deviation over rollouts"),
        Metric(
            "f1",
            "F1 of the answers with the best of the right ones, in evaluation, whatever the reward functions are",
            "rising; `metric_for_best_model` may name it",
            "rising `reward` and falling `eval_f1`: the reward function pays for something else, or the training "
            "questions are learned by heart",
        ),
        Metric("exact_match", "share of answers that are a right one, in evaluation", "rising, below `f1`", "as `f1`"),
    ),
    "Groups and advantages": (
        Metric(
            "collapse/outcome",
            "share of groups whose outcomes are all equal: GRPO learns nothing from them",
            "high early on; IGPO is made for this case. Falling later",
            "at 1 for long: the questions are too hard or too easy for the policy, "
            "[warm-start](warm_start.md) it or choose others",
        ),
        Metric(
            "collapse/advantage",
            "share of groups in which every advantage is 0",
            "well below `collapse/outcome`",
            "if it is not, gains carry no weight: see `info_gain/std`, and `info_gain_weight`",
        ),
        Metric(
            "frac_reward_zero_std",
            "share of groups whose outcomes have a standard deviation of 0, as TRL counts it: with "
            "`scale_rewards='batch'` it is the batch's",
            "as `collapse/outcome`; 0 with `scale_rewards='batch'`",
        ),
        Metric(
            "advantages/abs_mean",
            "mean absolute advantage of a turn",
            "around 0.5–1",
            "near 0, nothing is learned: see `collapse/advantage`",
        ),
        Metric(
            "credit/turn_price",
            "what a rollout pays for a further turn that changes nothing, in units of the advantage; below 0 it "
            "earns: see [the turn tax](method.md#the-turn-tax)",
            "0, as with `critic` and `returns`. Beyond ±0.2 for 20 batches in a row, training warns",
            "train with `normalization='critic'` or `'returns'`",
        ),
        Metric(
            "credit/explained_variance",
            "with `critic`: share of the variance of what follows a turn that the value explains, on rollouts that it "
            "was not fitted on; a mean over rollouts",
            "above 0, and rising with `belief/outcome_corr`",
            "below 0 the belief misleads: as `belief/outcome_corr`",
        ),
        Metric("info_gain_weight", "current weight of the gains, if it has a schedule"),
        Metric("outcome_weight", "current weight of the outcome, if it has a schedule"),
    ),
    "Beliefs and gains": (
        Metric(
            "info_gain/mean",
            "mean gain of a turn, in probability (in nats with `log_prob_diff` and `log_gap`)",
            "above 0, and growing while the agent learns to search",
            "at 0, searches find nothing that helps: `igpo data audit` says which questions the corpus can answer",
        ),
        Metric(
            "info_gain/std",
            "standard deviation of the gains",
            "well above `std_floor`; below it, gains carry almost no weight",
            "`info_gain='log_gap'`, which sees changes of small beliefs; or another `answer_template`",
        ),
        Metric(
            "info_gain/positive",
            "share of turns that raise the belief",
            "above one half once searches help",
            "as `info_gain/mean`",
        ),
        Metric(
            "belief/prompt",
            "mean belief before the first turn",
            "small and slowly growing",
            "near 1, the model knows the answers by heart: choose questions that it has to search for",
        ),
        Metric(
            "belief/final",
            "mean belief before the last turn",
            "above `belief/prompt`, and rising",
            "tiny even where the passages state the answer: compare `answer_template` with what the model writes",
        ),
        Metric(
            "belief/outcome_corr",
            "rank correlation (Spearman) of the last belief with the outcome, over rollouts; nothing if either is the "
            "same for all",
            "clearly above 0: the gains are only worth something if a higher belief comes with a higher outcome. At 0 "
            "or below for 20 batches in a row, training warns",
            "compare `answer_template` with what the model writes, and look at rollouts (`igpo view`)",
        ),
        Metric(
            "evidence/used",
            "how much less likely the policy's next turn is, per token in nats, with an empty observation in place of "
            "the one that it has just read; a mean over rollouts, with `evidence_every`",
            "above 0: the policy acts on what it reads",
            "at 0, it answers without reading: shorter observations, questions that it cannot know",
        ),
        Metric(
            "belief/seconds",
            "time of the belief pass per batch on the main process, wherever in the step it happens",
            "a small share of `step_time`",
            "see [what a step costs](performance.md)",
        ),
    ),
    "Rollouts": (
        Metric(
            "rollout/turns/mean",
            "turns of a rollout, including the answer",
            "not falling towards 1",
            "see [the turn tax](method.md#the-turn-tax) and `credit/turn_price`",
        ),
        Metric("rollout/turns/max", "turns of the longest rollout", "at most `max_turns`"),
        Metric(
            "rollout/stop/<reason>",
            "share of rollouts that ended for this [reason](rollouts.md#limits-and-why-a-rollout-ends)",
            "`answered`, or `stop_tool` with `stop_tools`, near 1; the others near 0, except for some `turn_limit` "
            "early on",
            "`length_limit`, `context_limit` or `turn_length_limit`: raise `max_completion_length` or "
            "`max_turn_length`, or lower `max_tool_response_tokens`",
        ),
        Metric(
            "rollout/forced_answer",
            "share of rollouts that were asked to answer at a limit",
            "falling",
            "raise the limit that `rollout/stop/<reason>` names",
        ),
        Metric(
            "completions/clipped_ratio",
            "share of rollouts whose last token is not an end of turn, most of them cut off by a limit",
            "near 0",
            "as `rollout/stop/<reason>`",
        ),
        Metric(
            "completions/<statistic>_terminated_length",
            "mean, smallest and largest number of sampled tokens of the rollouts that were not cut off",
        ),
        Metric(
            "completions/<statistic>_length",
            "the same over all rollouts",
            "no steady growth without a rising reward",
            "`max_turn_length`",
        ),
        Metric(
            "entropy",
            "mean entropy of the policy at sampled tokens, in nats",
            "falling slowly",
            "near 0 within a few steps, all rollouts of a group will be equal: a smaller `learning_rate`, a higher "
            "`temperature`, or `beta` above 0",
        ),
    ),
    "Tools": (
        Metric(
            "tools/call_frequency",
            "tool calls per rollout, the console's `searches`",
            "not falling towards 0 while the reward stays low",
            "as `rollout/turns/mean`; at 0 from the first step on, [warm-start](warm_start.md) the model",
        ),
        Metric("tools/failure_frequency", "share of calls with any error", "falling", "see `tools/errors/<kind>`"),
        Metric(
            "tools/errors/<kind>",
            "share of calls with this kind of [error](rollouts.md#when-something-is-wrong-with-a-call)",
            "`malformed`, `unknown_tool` and `bad_arguments` fall quickly in training; `raised`, `timeout` and "
            "`not_text` stay at 0",
            "the first three: warm-start the model; the others are faults of the tool",
        ),
        Metric(
            "tools/truncated",
            "share of results cut to `max_tool_response_tokens`",
            "low: the policy cannot learn from text that is cut off",
            "raise it, or let the search return fewer or shorter passages",
        ),
        Metric(
            "tools/latency/p<percentile>",
            "median and 95th percentile of the seconds per call",
            "far below `tool_timeout`; a round lasts about as long as its slowest call",
            "see `max_concurrent_tool_calls`, and `batch` of [tools](rollouts.md#tools)",
        ),
    ),
    "Optimization": (
        Metric(
            "loss",
            "loss of the policy gradient; in evaluation too, where it means nothing",
            "around 0: it is no measure of success",
        ),
        Metric("policy_loss", "the loss without its other terms"),
        Metric(
            "grad_norm",
            "norm of the gradient before it is clipped",
            "steady; above 0",
            "0: nothing is trained, see `collapse/advantage`. Spikes: a smaller `learning_rate`",
        ),
        Metric("learning_rate", "of the scheduler"),
        Metric(
            "kl",
            "with `beta`: mean divergence from the reference model per token, in nats",
            "growing slowly",
            "a jump comes with broken text: a larger `beta` or a smaller `learning_rate`",
        ),
        Metric(
            "clip_ratio/<bound>",
            "share of tokens whose importance ratio was clipped: `low_mean`, `high_mean`, `region_mean` (either), and "
            "the extremes over processes `low_min`, `high_max`",
            "0 with one update per batch, else below some per cent",
            "fewer `num_iterations`, or a smaller `learning_rate`",
        ),
        Metric("cispo_clip_ratio", "the same with `loss_type='cispo'`", "as `clip_ratio/<bound>`"),
        Metric("vespo/phi_seq_mean", "mean weight of a sequence with `loss_type='vespo'`"),
        Metric(
            "sampling/sampling_logp_difference/<statistic>",
            "with vLLM: difference between the log-probabilities of sampling and of training",
            "mean below 0.1",
            "the same dtype in both; see TRL's `vllm_importance_sampling_correction`",
        ),
        Metric(
            "sampling/importance_sampling_ratio/<statistic>",
            "with vLLM: the ratios that correct for it",
            "mean near 1",
            "as `sampling/sampling_logp_difference/<statistic>`",
        ),
        Metric("aux_loss", "load-balancing loss of a mixture of experts"),
        Metric("entropy_coef", "current coefficient of an entropy bonus"),
        Metric("num_tokens", "tokens of prompts and completions so far"),
        Metric("num_input_tokens_seen", "the same, if `include_num_input_tokens_seen` asks for it"),
        Metric("epoch", "passes over the training questions so far"),
    ),
    "Speed": (
        Metric("step_time", "seconds of an optimizer step with its rollouts", "steady"),
        Metric("perf/tokens_per_second", "tokens of the rollouts that were trained on, per second of the step"),
        Metric(
            "perf/seconds/<part>",
            "seconds per optimizer step: `sampling`, `tools` (with parsing and encoding), `beliefs`, `rewards`, "
            "`log_probs` (old and reference), `training` (forward and backward), `optimizer`, `other` (advantages, "
            "metrics, records)",
            "they add up to the step; an accelerator works asynchronously, so there the part that waits for a result "
            "is charged for it",
            "see [what a step costs](performance.md)",
        ),
        Metric(
            "perf/padding",
            "tokens that the forwards of the loss and of old and reference log-probabilities computed, per token that "
            "is not padding",
            "at most 1, and less where rollouts of a microbatch "
            "[share their prompt](performance.md#what-the-loss-computes)",
            "above 1: `pad_to_longest=True`, or a model or an attention that cannot take packed rows",
        ),
        Metric(
            "perf/head_tokens",
            "tokens per optimizer step on which the output head was run in these forwards",
            "as many as were sampled, once for each forward",
        ),
        Metric(
            "profiling/Time taken: <method>", "seconds of a method, which TRL sends to `wandb` and `trackio` alone"
        ),
        Metric("runtime", "seconds of an evaluation"),
        Metric("model_preparation_time", "seconds before an evaluation in which the model was prepared"),
        Metric("samples_per_second", "rollouts per second, of an evaluation"),
        Metric("steps_per_second", "batches per second, of an evaluation"),
        Metric("train_<total>", "of the whole training, logged once at its end: time, speed and mean loss"),
        Metric("total_flos", "floating-point operations of the whole training, as transformers estimates them"),
    ),
}


def describe(name: str) -> Metric | None:
    """
    The entry of the table for a metric, as it is logged in training or evaluation; `None` if there is none.

    Args:
        name (`str`): such as `tools/errors/timeout` or `eval_hotpotqa_f1`.
    """
    every = [metric for metrics in METRICS.values() for metric in metrics]
    names = [name] if not name.startswith("eval_") else [name[i + 1 :] for i, c in enumerate(name) if c == "_"]
    # The longest rest of the name first: `eval_reward_std` is `reward_std`, and `completions/mean_length` no `length`.
    return next((metric for rest in names for metric in every if metric.matches(rest)), None)


def table(metrics: tuple[Metric, ...]) -> str:
    """Metrics as a table in Markdown."""
    rows = ["| metric | meaning | healthy | when it is not |", "|---|---|---|---|"]
    for name, *cells in metrics:
        rows.append(f"| `{name}` | " + " | ".join(cell or "–" for cell in cells) + " |")
    return "\n".join(rows) + "\n"
