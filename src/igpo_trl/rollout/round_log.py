"""What the rounds of one generation batch were like, and the metrics of it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..trajectory import StopReason
from .tool_results import ToolErrorKind, ToolResult


@dataclass
class RoundLog:
    """
    Counts of one process over one generation batch.

    Attributes:
        stops (list of [`StopReason`]): why each rollout ended.
        forced (`int`): rollouts that were asked to answer.
        calls (`int`): tool calls, those included that were not run because something was wrong with them.
        truncated (`int`): results cut down to `max_tool_response_tokens`.
        errors (`Counter`): calls without a result, by kind.
        seconds (list of `float`): latency of every call that was run.
        called (list of list of tuple of `str`): names of the tools that each turn of each rollout called.
    """

    stops: list[StopReason] = field(default_factory=list)
    forced: int = 0
    calls: int = 0
    truncated: int = 0
    errors: Counter[ToolErrorKind] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    called: list[list[tuple[str, ...]]] = field(default_factory=list)

    def add(self, result: ToolResult, truncated: bool) -> None:
        """Count one tool call."""
        self.calls += 1
        self.truncated += truncated
        if result.error is not None:
            self.errors[result.error] += 1
        if result.seconds is not None:
            self.seconds.append(result.seconds)

    def metrics(self, accelerator: Any) -> dict[str, float]:
        """Metrics over all processes, each of which has to call this."""
        stops = Counter(self.stops)
        names = [f"rollout/stop/{reason}" for reason in StopReason] + ["rollout/forced_answer"]
        of_rollouts = [*(stops[reason] for reason in StopReason), self.forced]
        call_names = [f"tools/errors/{kind}" for kind in ToolErrorKind] + ["tools/truncated"]
        of_calls = [*(self.errors[kind] for kind in ToolErrorKind), self.truncated]
        counts = torch.tensor([[len(self.stops), self.calls, *of_rollouts, *of_calls]], device=accelerator.device)
        num_rollouts, num_calls, *totals = accelerator.gather(counts).sum(dim=0).tolist()
        per = [max(1, num_rollouts)] * len(names) + [max(1, num_calls)] * len(call_names)
        metrics = {name: total / number for name, total, number in zip(names + call_names, totals, per, strict=True)}
        # One value at least, so that every process has something to gather.
        seconds = torch.tensor([*self.seconds, torch.nan], device=accelerator.device)
        seconds = accelerator.gather(accelerator.pad_across_processes(seconds, pad_index=torch.nan))
        seconds = seconds[~seconds.isnan()].sort().values
        if len(seconds):  # nearest rank, for `quantile` takes sixteen million values at most
            for name, share in (("p50", 0.5), ("p95", 0.95)):
                metrics[f"tools/latency/{name}"] = seconds[round(share * (len(seconds) - 1))].item()
        return metrics
