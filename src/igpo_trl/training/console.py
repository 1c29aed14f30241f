"""What a person reads while training runs: one line per log, a few rollouts; every figure goes to a file."""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..files import move_aside
from ..report import format_belief, pieces, plain_text
from ..trajectory import drop_later

METRICS_FILE = "metrics.jsonl"
# Of a log that none of the lines below is made for: longer ones are in the file alone.
_MOST_FIGURES = 8
_ENDS = ("answered", "stop_tool")


class MetricsFile(TrainerCallback):
    """
    Writes every metric of every log to `output_dir/metrics.jsonl`, a JSON object a line, with its `step`.

    Training that resumes removes the lines of later steps. A new run moves the file of an earlier one to
    `metrics-1.jsonl` and so on. What is logged before training begins is written when it begins. Only the main process
    writes.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._early: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        again = self._path is not None  # `train` is called once more on the same trainer
        self._path = Path(args.output_dir, METRICS_FILE)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step > 0:
            self._early.clear()  # an evaluation of whatever was there before the checkpoint was loaded
            if self._path.exists():
                drop_later(self._path, state.global_step)
            # Of this step, what was logged before the checkpoint was saved and not what came after it.
            for logs in state.log_history:
                if logs["step"] == state.global_step:
                    self._add(logs)
        elif not again:
            move_aside(self._path)
        self._write()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._add({"step": state.global_step, **logs})
            self._write()

    def _add(self, logs: Mapping[str, Any]) -> None:
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in logs.items()}
        self._early.append(json.dumps({"step": logs["step"], **finite}, default=str) + "\n")

    def _write(self) -> None:
        if self._path is not None and self._early:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._early)
            self._early.clear()


class StepLines(ProgressCallback):
    """
    Prints the figures of a log that matter on one line, above the progress bar, in place of all of them.

    It takes the place of what transformers prints, in scripts and in notebooks. The bar is on terminals and in
    notebooks only, and not with `disable_tqdm`.

    Args:
        trainer (`Trainer`): the trainer to which it is added.
    """

    def __init__(self, trainer: Any):
        super().__init__()
        self._began: tuple[float, int] | None = None
        printers = [
            callback
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, PrinterCallback | ProgressCallback)
            or type(callback).__name__ == "NotebookProgressCallback"  # importing it needs IPython
        ]
        for callback in printers:
            trainer.remove_callback(callback)

    def _has_bar(self, args: Any, state: Any) -> bool:
        return state.is_world_process_zero and not args.disable_tqdm and (sys.stderr.isatty() or is_in_notebook())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic(), state.global_step
        if self._has_bar(args, state):
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_bar(args, state):
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := self._line(state, logs)):
            say(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _line(self, state: Any, logs: Mapping[str, Any]) -> str:
        evaluation = next((match[1] for name in logs if (match := re.fullmatch(r"([^/]+)_reward", name))), None)
        if evaluation is not None:
            of_set = {name.removeprefix(f"{evaluation}_"): value for name, value in logs.items()}
            return f"{evaluation} at step {state.global_step}  {figures(of_set, training=False)}"
        if not {"loss", "reward"}.isdisjoint(logs):  # with `num_iterations`, some steps have no rollouts
            total = f"/{state.max_steps}" if state.max_steps > 0 else ""
            step = f"step {state.global_step:>{len(total) - 1 if total else 1}}{total}"
            left = f"  left {duration(self._left(state))}" if state.global_step < state.max_steps else ""
            return f"{step}  {figures(logs)}{left}"
        if "train_runtime" in logs:
            return f"{state.global_step} steps, the last ones in {duration(logs['train_runtime'])}"
        if len(logs) <= _MOST_FIGURES:
            return f"step {state.global_step}  " + "  ".join(f"{name} {_short(x)}" for name, x in logs.items())
        return ""

    def _left(self, state: Any) -> float:
        """Seconds until the end, at the speed since training began, its evaluations included."""
        began, step = self._began or (time.monotonic(), state.global_step)
        done = state.global_step - step
        return (time.monotonic() - began) / done * (state.max_steps - state.global_step) if done > 0 else math.nan


def figures(logs: Mapping[str, Any], training: bool = True) -> str:
    """The figures of a log of training or evaluation that matter most, those that there are, in columns."""
    ends: list[Any] = [x for name in _ENDS if _is_number(x := logs.get(f"rollout/stop/{name}"))]
    # Evaluation has groups of one.
    collapse = logs.get("collapse/outcome") if training else None
    columns = (
        ("F1 {:5.3f}", logs.get("f1")),
        ("EM {:5.3f}", logs.get("exact_match")),
        ("reward {:6.3f}", logs.get("reward")),
        ("searches {:4.1f}", logs.get("tools/call_frequency")),
        ("belief {}", _path(logs.get("belief/prompt"), logs.get("belief/final"))),
        ("collapse {:4.0%}", collapse),
        ("answered {:4.0%}", sum(ends) if ends else None),
        ("tokens/s {:3.0f}", logs.get("perf/tokens_per_second")),
    )
    return "  ".join(form.format(value) for form, value in columns if isinstance(value, str) or _is_number(value))


def _path(before: Any, after: Any) -> str | None:
    """Two beliefs, as wide as any others."""
    if not (_is_number(before) and _is_number(after)):
        return None
    return f"{format_belief(before):>6} → {format_belief(after):<6}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`; `?` if they are not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def say(text: str) -> None:
    """Print above all progress bars, on any console."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("→", "->").replace("…", "...").encode(encoding, "backslashreplace").decode(encoding)
    tqdm.write(text)
    sys.stdout.flush()  # a log file is read while it is written


# ------------------------------------------------------------------------------------------------------ completions


def completions_table(logs: Mapping[str, Any], step: int, number: int | None = None, width: int | None = None) -> str:
    """
    A few rollouts of TRL's table of completions, one on a line, from the best to the worst.

    Args:
        logs (`dict`): TRL's columns, after [`make_loggable`].
        step (`int`): for the title.
        number (`int`, *optional*, defaults to 4): how many rollouts.
        width (`int`, *optional*): of the table, in characters. By default that of the terminal, 120 without one.
    """
    rewards = list(zip(*logs["rewards"].values(), strict=True))
    totals = [sum(x for x in row if x == x) for row in rewards] or [0.0] * len(logs["prompt"])
    ranking = sorted(range(len(totals)), key=lambda i: -totals[i])
    console = Console(width=width) if width or Console().is_terminal else Console(width=120)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
    beliefs = logs["extra"].get("belief", ())
    styles: dict[str, dict[str, Any]] = {
        "reward": {"justify": "right", "no_wrap": True},
        **({"belief": {"no_wrap": True}} if any(beliefs) else {}),
        "question": {"ratio": 2, "no_wrap": True, "overflow": "ellipsis"},
        "rollout": {"ratio": 3, "no_wrap": True, "overflow": "ellipsis"},
    }
    for name, options in styles.items():
        table.add_column(name, **options)
    for i in _spread(ranking, 4 if number is None else number):
        path = [Text(" → ".join(_beliefs(beliefs[i])))] if any(beliefs) else []
        table.add_row(
            f"{totals[i]:+.2f}", *path, Text(_question(logs["prompt"][i])), Text(_rollout(logs["completion"][i]))
        )
    title = f"Rollouts of step {step}: {table.row_count} of {len(totals)}, the best first"
    with console.capture() as capture:
        console.print(title, table, sep="\n", markup=False, highlight=False)
    return capture.get().rstrip()


def _spread(ranking: Sequence[int], number: int) -> list[int]:
    """The first and the last of a ranking, and others at equal distances."""
    if number >= len(ranking):
        return list(ranking)
    if number < 2:
        return list(ranking[:number])
    return [ranking[round(i * (len(ranking) - 1) / (number - 1))] for i in range(number)]


def _beliefs(column: Any) -> Iterable[str]:
    """Belief before the first and before the last turn, of a text such as `+0.085 +0.120 +0.283`."""
    values = str(column).split()
    return [format_belief(float(value)) for value in (values if len(values) < 2 else (values[0], values[-1]))]


def _question(prompt: Any) -> str:
    users = [message for message in prompt if message.get("role") == "user"] if isinstance(prompt, list) else []
    return _visible(str(users[-1].get("content") if users else prompt))


def _rollout(completion: Any) -> str:
    """What the policy did, without what it read."""
    if not isinstance(completion, list):
        return " · ".join(_visible(piece.text) for piece in pieces(str(completion)))
    texts = []
    for message in completion:
        if message.get("role") in ("assistant", ""):
            texts += [piece.text for piece in pieces(str(message.get("content") or "")) if piece.kind != "think"]
            functions = [call["function"] for call in message.get("tool_calls") or ()]
            texts += [f"{function['name']}({function['arguments']})" for function in functions]
    return " · ".join(map(_visible, texts))


def _visible(text: str) -> str:
    """On one line, without what would move the cursor."""
    return "".join(c if c.isprintable() else " " for c in plain_text(text))
