"""Counts of one generation batch's rounds, and their metrics."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..trajectory import Call, StopReason
from .tool_failures import ToolCounts
from .tool_results import ToolErrorKind, ToolResult


@dataclass
class RoundLog:
    """
    Counts of one rank over one generation batch.

    Attributes:
        stops (list of [`StopReason`]): why each rollout ended.
        num_forced_answers (`int`): rollouts that were asked to answer.
        num_calls (`int`): tool calls, including those that could not be run.
        num_truncated (`int`): results cut down to `max_tool_response_tokens`.
        errors (`Counter`): calls without a result, by kind.
        tools (`dict[str, ToolCounts]`): calls that have run, by name of the tool.
        latencies (list of `float`): seconds of every call that was run.
        tools_called (list of list of tuple of `str`): names of the tools that each turn of each rollout called.
        calls (list of list of list of [`Call`]): the calls of each turn of each rollout.
        global_num_calls, global_num_malformed (`int`): tool calls of all ranks, and those of them that could not be
            read, once there are `metrics`.
        global_num_rollouts (`int`): rollouts of all ranks that count, likewise.
    """

    stops: list[StopReason] = field(default_factory=list)
    num_forced_answers: int = 0
    num_calls: int = 0
    num_truncated: int = 0
    errors: Counter[ToolErrorKind] = field(default_factory=Counter)
    tools: dict[str, ToolCounts] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    tools_called: list[list[tuple[str, ...]]] = field(default_factory=list)
    calls: list[list[list[Call]]] = field(default_factory=list)
    global_num_calls: int = 0
    global_num_malformed: int = 0
    global_num_rollouts: int = 0

    def add(self, name: str, result: ToolResult, truncated: bool) -> None:
        """Count one call of the tool of this name."""
        self.num_calls += 1
        self.tools.setdefault(name, ToolCounts()).add(result)
        self.num_truncated += truncated
        if result.error is not None:
            self.errors[result.error] += 1
        if result.seconds is not None:
            self.latencies.append(result.seconds)

    def metrics(self, accelerator: Any, num_counted: int | None = None) -> dict[str, float]:
        """Metrics over all ranks, which all must call this; of the rollouts only the first `num_counted` count."""
        counted = self.stops[:num_counted]
        stops = Counter(counted)
        per_rollout = {f"rollout/stop/{reason}": stops[reason] for reason in StopReason}
        per_rollout["rollout/forced_answer"] = self.num_forced_answers
        per_call = {f"tools/errors/{kind}": self.errors[kind] for kind in ToolErrorKind}
        per_call["tools/truncated"] = self.num_truncated
        local_counts = [len(counted), self.num_calls, *per_rollout.values(), *per_call.values()]
        global_counts = accelerator.gather(torch.tensor([local_counts], device=accelerator.device)).sum(dim=0).tolist()
        num_rollouts, num_calls, *counts = global_counts
        totals = dict(zip([*per_rollout, *per_call], counts, strict=True))
        self.global_num_rollouts, self.global_num_calls = num_rollouts, num_calls
        self.global_num_malformed = totals[f"tools/errors/{ToolErrorKind.MALFORMED}"]
        metrics = {
            name: total / max(1, num_rollouts if name in per_rollout else num_calls) for name, total in totals.items()
        }
        # At least one value, so that every rank has something to gather.
        latencies = torch.tensor([*self.latencies, torch.nan], device=accelerator.device)
        latencies = accelerator.gather(accelerator.pad_across_processes(latencies, pad_index=torch.nan))
        latencies = latencies[~latencies.isnan()].sort().values
        if len(latencies):  # nearest rank, because `quantile` takes at most sixteen million values
            for name, share in (("p50", 0.5), ("p95", 0.95)):
                metrics[f"tools/latency/{name}"] = latencies[round(share * (len(latencies) - 1))].item()
        return metrics
