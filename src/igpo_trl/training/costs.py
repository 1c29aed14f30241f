"""Where the time of a training step goes, and how much of what it computes is needed."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import TrainerCallback


class Costs:
    """
    Where the time of optimizer steps goes, and how much of what their forwards compute is needed, on this process.

    Parts are disjoint: while one runs inside another, the outer one's clock stands still. Whatever runs outside of a
    training step, such as evaluation, is not counted. Accelerators work asynchronously, so that on them the part that
    waits for a result is charged for it.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []  # from the outermost to the one that runs
        self._since = 0.0
        self.clear()

    def clear(self) -> None:
        """Forget what has been counted."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.num_steps = self.num_computed = self.num_real = self.num_scored = self.num_trained = 0

    @contextmanager
    def part(self, name: str, *, outermost: bool = False) -> Iterator[None]:
        """Charge what runs here to a part, if it is in a training step or is one."""
        if not self._parts and not outermost:
            yield
            return
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def add_forward(self, num_computed: int, num_real: int, num_scored: int) -> None:
        """
        Count the forwards of log-probabilities or of a loss.

        Args:
            num_computed, num_real (`int`): tokens, with and without padding.
            num_scored (`int`): tokens that the output head has been run on.
        """
        if not self._parts:
            return
        self.num_computed += num_computed
        self.num_real += num_real
        self.num_scored += num_scored
        self.num_trained += num_real * torch.is_grad_enabled()

    def metrics(self) -> dict[str, float]:
        """Metrics per optimizer step; none if no step has ended."""
        if not (self.num_steps and self.num_real):
            return {}
        return {
            "perf/padding": self.num_computed / self.num_real,
            "perf/head_tokens": self.num_scored / self.num_steps,
            "perf/tokens_per_second": self.num_trained / sum(self.seconds.values()),
            **{f"perf/seconds/{part}": seconds / self.num_steps for part, seconds in self.seconds.items()},
        }


class TimesOptimizer(TrainerCallback):
    """Charges the optimizer's time, which is outside of TRL's training step, and counts its steps."""

    def __init__(self, costs: Costs):
        self._costs = costs
        self._started = 0.0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._costs.seconds["optimizer"] += time.perf_counter() - self._started
        self._costs.num_steps += 1


def timed(part: str) -> Callable[[Any], Any]:
    """Charge a method of a trainer to a part of the step's [`Costs`]."""

    def decorate(method: Any) -> Any:
        @wraps(method)
        def timed_method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.costs.part(part):
                return method(self, *args, **kwargs)

        return timed_method

    return decorate
