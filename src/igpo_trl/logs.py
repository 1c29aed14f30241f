"""What TRL logs: means over rollouts instead of batches, and completions that every table can hold."""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import has_length

from .files import encodable
from .records import TURN_COLUMNS, completion_columns
from .rollout.tool_results import MAX_NESTING, nesting, show
from .step import Step
from .training.console import completions_table, say
from .training.costs import Costs, TimesOptimizer
from .training.diagnostics import FirstCalls, make_watches

# Times that are logged once per batch or step, however many rollouts it has.
PER_BATCH = ("belief/seconds", "step_time")
# A smallest or largest value, which has no mean: `completions/min_length`, `rollout/turns/max`, `clip_ratio/high_max`.
_EXTREME = re.compile(r"(?:completions|rollout|clip_ratio|sampling)/(?:.*[/_])?(min|max)(?:_\w+)?")


class MetricWeights:
    """
    The weights of the values in TRL's lists of metrics, one per batch. TRL averages them as if all were equal.

    The weight of a mean over rollouts is their number, and that of a rate its denominator. A smallest or largest value
    stays one.
    """

    carried = ("weights",)

    def __init__(self) -> None:
        self.weights: dict[str, list[float]] = defaultdict(list)

    def add(
        self, metrics: Mapping[str, Sequence[float]], weight: float, others: Mapping[str, float] | None = None
    ) -> None:
        """Weigh the values that were appended since the last call; `others` are weights of certain metrics."""
        special = dict.fromkeys(PER_BATCH, 1.0) | dict(others or {})
        for name, values in metrics.items():
            weights = self.weights[name]
            weights.extend([special.get(name, weight)] * (len(values) - len(weights)))

    def reduce(self, metrics: dict[str, list[float]]) -> None:
        """Replace the values of each metric by the one to log, NaN if it has none."""
        self.add(metrics, 1.0)
        for name, values in metrics.items():
            pairs = [(x, w) for x, w in zip(values, self.weights[name], strict=False) if not math.isnan(x)]
            self.weights[name] = [sum(weight for _, weight in pairs)]
            # A rate whose denominator is 0 everywhere: whatever was logged for it.
            pairs = [pair for pair in pairs if pair[1] > 0] or [(x, 1.0) for x, _ in pairs]
            metrics[name] = [_combined(name, pairs)]

    def clear(self) -> None:
        self.weights.clear()


def denominators(step: Step, metrics: Mapping[str, Sequence[float]], reward_names: Sequence[str]) -> dict[str, float]:
    """
    The weights of a batch's metrics that are not means over its rollouts.

    Args:
        step ([`Step`]): the batch.
        metrics (`dict`): TRL's lists, which end with the batch.
        reward_names (list of `str`): of the reward functions.
    """
    counted = slice(step.num_counted)
    scored = ~step.global_rewards[counted].isnan()
    weights = dict.fromkeys(("reward", "reward_std"), scored.any(dim=1).sum().item())
    for name, number in zip(reward_names, scored.sum(dim=0).tolist(), strict=True):
        weights |= dict.fromkeys((f"rewards/{name}/mean", f"rewards/{name}/std"), number)
    terminated = len(scored) * (1 - metrics["completions/clipped_ratio"][-1])
    weights |= {f"completions/{kind}_terminated_length": terminated for kind in ("mean", "min", "max")}
    # Of every call, or of every result.
    per_call = [name for name in metrics if name.startswith("tools/") and name != "tools/call_frequency"]
    weights |= dict.fromkeys(per_call, step.round_log.global_num_calls)
    if step.global_gains is not None and step.global_beliefs is not None:
        per_gain = ("info_gain/mean", "info_gain/std", "info_gain/positive")
        weights |= dict.fromkeys(per_gain, step.gains_that_count.numel())
        scored_rollouts = (~step.global_beliefs[counted, 0].isnan()).sum().item()
        weights |= dict.fromkeys(("belief/prompt", "belief/final"), scored_rollouts)
    weights["advantages/abs_mean"] = step.global_num_turns[counted].sum().item()
    return weights


def averages_over_sets(metrics: Mapping[str, float], sets: Sequence[str], prefix: str = "eval") -> dict[str, float]:
    """The mean over evaluation sets of each metric that all of them have, apart from times and counts of tokens."""
    averages = {}
    for key in [key.removeprefix(f"{prefix}_{sets[0]}_") for key in metrics] if sets else []:
        names = [f"{prefix}_{name}_{key}" for name in sets]
        if all(name in metrics for name in names) and not re.search(r"(runtime|per_second|_time|num_tokens)$", key):
            averages[f"{prefix}_{key}"] = sum(metrics[name] for name in names) / len(names)
    return averages


def _combined(name: str, pairs: Sequence[tuple[float, float]]) -> float:
    if not pairs:
        return math.nan
    values, weights = zip(*pairs, strict=True)
    if extreme := _EXTREME.fullmatch(name):
        return min(values) if extreme[1] == "min" else max(values)
    if len(set(weights)) == 1:
        return sum(values) / len(values)  # as TRL, bit for bit
    return sum(value * weight for value, weight in pairs) / sum(weights)


class LogsRollouts(Trainer):
    """The part of [`IGPOTrainer`] that logs, and that knows whether rollouts are trained on or evaluated."""

    _metrics: dict[str, dict[str, list[float]]]
    _logs: dict[str, Any]
    log_completions: bool
    num_completions_to_print: int | None
    num_generations_eval: int
    reward_func_names: list[str]
    control: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self.costs = Costs()
        super().__init__(*args, **kwargs)
        self.add_callback(TimesOptimizer(self.costs))
        self._metric_weights = {"train": MetricWeights(), "eval": MetricWeights()}
        self._watches = make_watches()
        self._first_calls = FirstCalls()
        self._rollouts_left: float | None = None  # of the evaluation in progress
        self._has_new_rollouts = False  # since the last log

    @property
    def is_training(self) -> bool:
        """Whether the current rollouts are trained on, in whatever mode a backend has left the model."""
        return self._rollouts_left is None and self.model.training

    @property
    def mode(self) -> str:
        """What TRL calls this in its metrics."""
        return "train" if self.is_training else "eval"

    def count_rollouts(self, size: int) -> int:
        """How many rollouts of the next batch count, of which every rank has `size`; see [`Step`]."""
        number = size * self.accelerator.num_processes
        if self._rollouts_left is not None:
            number = int(min(number, self._rollouts_left))
            self._rollouts_left -= number
        return number

    def log_step(self, step: Step) -> None:
        """Log a generation batch, and give weights to what the parent has logged of it."""
        metrics, of_step = self._metrics[self.mode], step.metrics(self.accelerator.gather, self.accelerator.device)
        for name, value in of_step.items():
            metrics[name].append(value)
        if self.is_world_process_zero():
            self._first_calls.update(step.round_log)
        if step.training:
            for name, watch in self._watches.items():
                watch.update(of_step.get(name))
        weights = denominators(step, metrics, self.reward_func_names)
        self._metric_weights[self.mode].add(metrics, len(step.global_num_turns[: step.num_counted]), weights)
        self._has_new_rollouts = True
        if self.log_completions:
            for name, column in completion_columns(step).items():
                self._logs["extra"][name].extend(column)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # The parent has logged means over these tokens.
        tokens = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).sum().float()
        self._metric_weights[self.mode].add(self._metrics[self.mode], self.accelerator.reduce(tokens).item())
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.costs.part("training", outermost=True):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = self.mode
        if mode == "train":
            for name, value in self.costs.metrics().items():
                self._metrics[mode][name].append(value)
            self.costs.clear()
        self._metric_weights[mode].reduce(self._metrics[mode])
        if self.log_completions:
            make_loggable(self._logs)
        # The parent prints every completion in full, at the end of training once more.
        wanted, self.num_completions_to_print = self.num_completions_to_print, -1
        try:
            super().log(logs, start_time)
        finally:
            self.num_completions_to_print = wanted
        if self.log_completions and self._has_new_rollouts and wanted != 0 and self.is_world_process_zero():
            say(completions_table(self._logs, self.state.global_step, wanted))
        self._has_new_rollouts = False
        self._metric_weights[mode].clear()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(sets, dict):
            return metrics
        averages = averages_over_sets(metrics, list(sets), metric_key_prefix)
        self.log(dict(averages))
        # The parent has called this for each set, but the metric of early stopping may be an average.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, averages)
        return metrics | averages

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL adds what it has gathered to the log alone, and always under `eval_`: neither the caller of `evaluate`
        # nor the choice of the best checkpoint sees it, and the sets of a dict could not be told apart.
        dataset = dataloader.dataset
        self._rollouts_left = len(dataset) * self.num_generations_eval if has_length(dataset) else math.inf
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._rollouts_left = None
        prefix, gathered = kwargs.get("metric_key_prefix", "eval"), self._metrics["eval"]
        self._metric_weights["eval"].reduce(gathered)
        output.metrics.update({f"{prefix}_{name}": value for name, (value,) in gathered.items() if value == value})
        gathered.clear()
        self._metric_weights["eval"].clear()
        return output


def fill_columns(logs: Mapping[str, Any], pending: dict[str, list[Any]], num_rollouts: int) -> None:
    """
    Give every rollout a value in every column that reward functions log (`log_extra`), `None` where they logged none.

    Args:
        logs (`dict`): TRL's table so far.
        pending (`dict`): columns of the batch, by name, of any length.
        num_rollouts (`int`): rollouts of the batch on this process.
    """
    for name in {*logs["extra"], *pending} - {*TURN_COLUMNS}:
        values = [*pending.get(name, []), *[None] * num_rollouts]
        pending[name] = values[:num_rollouts]


def make_loggable(logs: Mapping[str, Any]) -> None:
    """
    Give every column of TRL's table one type, which Arrow and W&B would infer from values that a policy wrote.

    All messages get the same keys, with text as values; the arguments of a tool call are the text of a JSON object.
    All text can be encoded as UTF-8. A column of a reward function becomes text, unless it holds only numbers or only
    booleans.
    """
    for column in (logs["prompt"], logs["completion"]):
        chats = [value if _is_chat(value) else [{"role": "", "content": value}] for value in column]
        keys = dict.fromkeys(key for messages in chats for message in messages for key in message)
        chatting = any(map(_is_chat, column))  # the evaluation set may chat and the training set may not
        _replace(column, [_chat(messages, keys) for messages in chats] if chatting else list(map(_text, column)))
    for column in logs["extra"].values():
        # A column that appears in the middle of training has no values for the rollouts before.
        _replace(column, _of_one_type([*[None] * (len(logs["prompt"]) - len(column)), *column]))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console that is not UTF-8


def _replace(column: Any, values: Sequence[Any]) -> None:
    column.clear()
    column.extend(values)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _chat(messages: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {key: _calls(message.get(key)) if key == "tool_calls" else _text(message.get(key)) for key in keys}
        for message in messages
    ]


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls, well-formed or not, in the usual form."""
    entries = calls if isinstance(calls, list) else [] if calls is None else [calls]
    functions = [entry.get("function", entry) if isinstance(entry, Mapping) else entry for entry in entries]
    pairs = [
        (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, function)
        for function in functions
    ]
    return [
        {"type": "function", "function": {"name": _text(name), "arguments": _json_object(arguments)}}
        for name, arguments in pairs
    ]


def _json_object(arguments: Any) -> str:
    """The text of a JSON object that any reader of JSON can read."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    if not isinstance(arguments, Mapping):
        arguments = {} if arguments is None else {"arguments": arguments}
    if nesting(arguments) > MAX_NESTING:
        arguments = {"arguments": _text(arguments)}
    try:
        return encodable(json.dumps(arguments, ensure_ascii=False))
    except Exception:  # keys or values that JSON cannot express, integers of thousands of digits
        return json.dumps({"arguments": encodable(show(arguments))}, ensure_ascii=False)


def _text(value: Any) -> str:
    """Any value as text that UTF-8 can encode; nothing for `None`, and the text parts of a content that has parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        return "\n".join(_text(part.get("text", f"[{_text(part['type'])}]")) for part in value)
    try:
        return encodable(json.dumps(value, ensure_ascii=False))
    except Exception:  # what JSON cannot express, or nests too deeply
        return encodable(show(value))


def _of_one_type(values: Sequence[Any]) -> list[Any]:
    plain = [value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else value for value in values]
    kinds = {type(value) for value in plain if value is not None}
    numbers = kinds <= {int, float} and all(abs(value or 0) < 2**63 for value in plain if isinstance(value, int))
    return plain if kinds == {bool} or numbers else [_text(value) for value in plain]
