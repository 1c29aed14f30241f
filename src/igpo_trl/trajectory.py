"""The record of one rollout: what the policy did, what it saw, and what it believed after each turn.

This is all that training and viewing share: it needs neither torch nor TRL. On disk it is JSON Lines, one rollout a
line.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from .files import replace_when_complete


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWERED = "answered"
    """The policy ended its turn without calling a tool, or gave an answer before any call."""
    TURN_LIMIT = "turn_limit"
    """It called a tool in the last turn that `max_turns` or `max_tool_calling_iterations` allows."""
    TURN_LENGTH_LIMIT = "turn_length_limit"
    """`max_turn_length` or `generation_kwargs` cut a turn off before any call was complete."""
    LENGTH_LIMIT = "length_limit"
    """`max_completion_length` was reached, or left no room for an observation and another turn."""
    CONTEXT_LIMIT = "context_limit"
    """The same with the model's context."""
    MALFORMED = "malformed"
    """It sampled a tool call that cannot be read, and `on_malformed_tool_call="end"`."""
    STOP_TOOL = "stop_tool"
    """It called one of the `stop_tools`."""
    EMPTY = "empty"
    """The backend sampled nothing."""


@dataclass
class Turn:
    """
    One turn: what the policy sampled, and the observation that followed.

    Attributes:
        text (`str`): the sampled tokens, decoded with special tokens; empty where the length limit left no room.
        observation (`str`): the tokens between this turn and the next one, decoded; empty after the last turn.
        num_tokens (`int`): sampled tokens.
        belief (`float` or `None`): probability of the right answer before this turn (geometric mean over its tokens).
        info_gain (`float` or `None`): gain of this turn; `None` for the last turn and where no belief was scored.
        advantage (`float` or `None`): the advantage that every sampled token of the turn was trained with.
    """

    text: str
    observation: str = ""
    num_tokens: int = 0
    belief: float | None = None
    info_gain: float | None = None
    advantage: float | None = None


@dataclass
class Trajectory:
    """
    One rollout.

    Attributes:
        prompt (`str`): the rendered prompt.
        turns (list of [`Turn`]): at least one.
        answers (list of `str`): right answers, the first is the gold one.
        outcome (`float` or `None`): weighted sum of the reward functions; `None` if none applied.
        rewards (`dict[str, float | None]`): each reward function's value.
        step (`int`): optimizer step at which it was sampled.
        group (`int`): number of its group within the batch.
        stop_reason (`str` or `None`): why it ended, a [`StopReason`]; `None` if unknown.
        info (`dict`): anything else, JSON-serialisable.
    """

    prompt: str
    turns: list[Turn]
    answers: list[str] = field(default_factory=list)
    outcome: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    step: int = 0
    group: int = 0
    stop_reason: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def beliefs(self) -> list[float | None]:
        """Belief before each turn; entry k > 0 is the belief after turn k and its observation."""
        return [turn.belief for turn in self.turns]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Trajectory":
        """The inverse of [`Trajectory.to_json`]."""
        record = json.loads(line)
        record["turns"] = [Turn(**turn) for turn in record["turns"]]
        return cls(**record)


def write_jsonl(path: str | Path, trajectories: Iterable[Trajectory], append: bool = False) -> None:
    """Write trajectories, one a line; parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which UTF-8 cannot encode, becomes its escape, which JSON can read.
    with path.open("a" if append else "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(trajectory.to_json() + "\n" for trajectory in trajectories)


def drop_later(path: str | Path, step: int) -> None:
    """
    Remove the trajectories of a step and of all later ones from a file, and lines that are not trajectories.

    Training that resumes from a checkpoint samples those steps again. A last line that a killed process left
    incomplete is removed as well.
    """
    with replace_when_complete(path) as temporary:
        with Path(path).open(encoding="utf-8") as file, temporary.open("w", encoding="utf-8") as earlier:
            for line in file:
                try:
                    if json.loads(line)["step"] < step:
                        earlier.write(line)
                except (ValueError, KeyError, TypeError):
                    continue


def read_jsonl(path: str | Path) -> Iterator[Trajectory]:
    """
    Read trajectories one by one.

    Raises:
        `ValueError`: names the file and the line that is not a trajectory.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Trajectory.from_json(line)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a trajectory ({error}).") from error
