"""The pictures of a model card: learning curves, and the belief before each turn early and late in training."""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...report import plot_curves

logger = logging.getLogger(__name__)

CURVE, BELIEFS = "learning_curve.png", "beliefs_by_turn.png"


class TurnBeliefs(TrainerCallback):
    """Remembers the mean belief before each turn, for every step; takes no time and needs no records."""

    carried = ("by_step",)

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.by_step: dict[int, list[float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.by_step.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.trainer.current_step
        if state.is_world_process_zero and step.training and step.global_beliefs is not None:
            beliefs, turns = step.global_beliefs.tolist(), step.global_num_turns.tolist()
            columns: list[list[float]] = [[] for _ in range(max(turns))]
            for row, number in zip(beliefs, turns, strict=True):
                for column, belief in zip(columns, row[:number], strict=False):
                    if math.isfinite(belief):
                        column.append(belief)
            enough = max(map(len, columns)) / 20  # of the last turns there are few
            self.by_step[state.global_step] = [sum(c) / len(c) for c in columns if c and len(c) >= enough]


def draw_pictures(trainer: Any, folder: Path) -> dict[str, str]:
    """Draws pictures into the folder of a card: what each shows, by its file. Without matplotlib there are none."""
    logs = trainer.state.log_history
    titles = {"reward": "Reward", "belief/final": "Belief before the last turn", "tools/call_frequency": "Searches"}
    titles |= {name: "Held-out F1" for log in logs for name in log if re.fullmatch(r"eval_(.+_)?f1", name)}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, title in titles.items():
        points = [(float(log["step"]), float(log[name])) for log in logs if is_number(log.get(name))]
        if len({step for step, _ in points}) > 1:
            label = name.removeprefix("eval_").removesuffix("_f1") if name.endswith("_f1") else "this run"
            curves.setdefault(title, {})[label if name != "eval_f1" else "this run"] = points
    beliefs = trainer.turn_beliefs.by_step
    parts = {}
    if beliefs:
        size = math.ceil(len(beliefs) / 10)
        chosen = {"first tenth of the steps": list(beliefs.values())[:size]}
        if len(beliefs) > 1:
            chosen["last tenth"] = list(beliefs.values())[-size:]
        parts = {name: _by_turn(rows) for name, rows in chosen.items()}
    drawn = {}
    try:
        if curves:
            plot_curves(curves, folder / CURVE)
            drawn[CURVE] = "Learning curves"
        if any(len(points) > 1 for points in parts.values()):
            plot_curves({"Belief in the right answer": parts}, folder / BELIEFS, "turns taken")
            drawn[BELIEFS] = "Belief in the right answer before each turn"
    except ImportError:
        logger.info('The model card has no pictures without the extra "plots".')
    return drawn


def _by_turn(rows: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    longest = max(map(len, rows))
    columns = [[row[k] for row in rows if len(row) > k] for k in range(longest)]
    return [(float(k), sum(column) / len(column)) for k, column in enumerate(columns)]


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
