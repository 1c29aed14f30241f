"""One rollout in progress, and what bounds it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..trajectory import Call, StopReason
from .tool_calls import ToolCall
from .turn_reader import Message


@dataclass(frozen=True)
class RolloutLimits:
    """
    What bounds a rollout; all lengths in tokens.

    Attributes:
        max_completion_length (`int`): turns and observations of a rollout together.
        max_turn_length (`int`): sampled tokens of one turn.
        max_new_tokens (`int`): the same, from `generation_kwargs`. As in TRL, a turn that it cuts off is not closed by
            an end-of-turn token.
        context_length (`int`): prompt and completion together.
        max_rounds (`int`): rounds of tool calls.
        forced_answer_prompt (`str`, *optional*): user message that asks a rollout which reaches a limit to answer;
            `None` ends it there.
        forced_answer_length (`int`): tokens kept free for that answer.
        on_malformed_tool_call (`str`): `"observe"` tells the policy what was wrong, `"end"` ends the rollout.
        stop_tools (set of `str`): names of the tools whose call ends the rollout.
    """

    max_completion_length: int
    max_turn_length: int = sys.maxsize
    max_new_tokens: int = sys.maxsize
    context_length: int = sys.maxsize
    max_rounds: int = sys.maxsize
    forced_answer_prompt: str | None = None
    forced_answer_length: int = 64
    on_malformed_tool_call: Literal["observe", "end"] = "observe"
    stop_tools: frozenset[str] = frozenset()

    @property
    def answer_room(self) -> int:
        """Tokens kept free for a forced answer: at most an eighth of the completion."""
        turn_length = min(self.max_turn_length, self.max_new_tokens)
        return min(self.forced_answer_length, turn_length, self.max_completion_length // 8)

    def stop_calls(self, calls: Sequence[ToolCall]) -> list[ToolCall]:
        """Those of the calls of a turn that can run and then end the rollout."""
        return [call for call in calls if call.name in self.stop_tools and call.problem is None]


@dataclass(eq=False)
class Rollout:
    """
    One rollout in progress.

    Attributes:
        index (`int`): its number within this rank's batch.
        prompt_ids (list of `int`): token ids of the prompt.
        tools (`dict`): the tools that it may call, by name.
        environment (*optional*): whose methods are among the tools; their calls run one after another.
        completion_ids, sampled_mask (list of `int`): token ids so far, and 1 on the sampled ones, 0 on observations.
        logprobs (list of `float`, *optional*): of the completion's tokens, 0 on observations.
        messages (list of `dict`): the completion as messages.
        turn_starts (list of `int`): completion position at which each turn begins. Once the rollout has ended they are
            those of [`turn_spans`].
        tools_called (list of tuple of `str`): names of the tools that each turn called.
        calls (list of list of [`Call`]): the calls of each turn, as they are recorded.
        stop (`StopReason`, *optional*): why it ended, or why its last turn has been asked for.
    """

    index: int
    prompt_ids: list[int]
    tools: dict[str, Callable[..., Any]]
    environment: Any = None
    logprobs: list[float] | None = None
    completion_ids: list[int] = field(default_factory=list)
    sampled_mask: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turn_starts: list[int] = field(default_factory=list)
    tools_called: list[tuple[str, ...]] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    stop: StopReason | None = None
    observation_ids: list[int] = field(default_factory=list)  # the last observation
    pending_calls: list[ToolCall] = field(default_factory=list)  # to be run before the next turn, or the last ones
    num_rounds: int = 0  # of tool calls
    turn_was_cut: bool = False  # `max_turn_length` left the last turn without an end-of-turn token
    answer_request_pending: bool = False  # to be asked to answer before the next turn
    answer_requested: bool = False  # the next turn is the last

    @property
    def context_ids(self) -> list[int]:
        """Prompt and completion so far."""
        return self.prompt_ids + self.completion_ids

    @property
    def continues(self) -> bool:
        """Whether another turn may follow the one that it has just sampled."""
        return not self.answer_requested and (self.stop is None or self.answer_request_pending)

    def append(self, ids: Sequence[int], sampled: int, logprobs: Sequence[float] | None = None) -> None:
        """Append tokens to the completion; `sampled` is 1 for a turn and 0 for an observation."""
        self.completion_ids += ids
        self.sampled_mask += [sampled] * len(ids)
        if self.logprobs is not None:
            self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs
