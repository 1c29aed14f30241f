"""Rollouts as readable text: what a turn says, the question, numbers in a few characters."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from ..files import encodable
from ..trajectory import Trajectory

PieceKind = Literal["think", "call", "answer", "text"]
_KINDS: dict[str, PieceKind] = {"think": "think", "tool_call": "call", "answer": "answer"}

_BLOCK = re.compile(r"<(think|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_CHAT_MARKER = re.compile(r"<\|im_start\|>\s*(?:system|user|assistant|tool)?|<\|[^|<>]+\|>|</?tool_response>")
_USER_MESSAGE = re.compile(
    r"(?:<\|im_start\|>user|<\|start_header_id\|>user<\|end_header_id\|>|<\|user\|>)\s*(.*?)(?=<\||\Z)", re.DOTALL
)


class Piece(NamedTuple):
    """A part of a turn: reasoning, a tool call, the answer, or other text."""

    kind: PieceKind
    text: str


def plain_text(text: str) -> str:
    """A text without the markers of the chat template, as a single paragraph."""
    return " ".join(_CHAT_MARKER.sub(" ", encodable(text)).split())


def pieces(text: str) -> list[Piece]:
    """
    The parts of a turn in order, in readable form: a JSON tool call becomes `search(query="…")`.

    For display only. A block that is never closed extends to the end of the turn. A call that is not valid JSON is
    shown unchanged.
    """
    parts: list[Piece] = []
    end = 0
    for match in _BLOCK.finditer(text):
        kind, body = _KINDS[match.group(1).lower()], match.group(2)
        parts.append(Piece("text", plain_text(text[end : match.start()])))
        parts.append(Piece(kind, _call(body) if kind == "call" else plain_text(body)))
        end = match.end()
    parts.append(Piece("text", plain_text(text[end:])))
    return [piece for piece in parts if piece.text]


def _call(body: str) -> str:
    try:
        call = json.loads(body)
        arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items())
        return encodable(f"{call['name']}({', '.join(arguments)})")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return plain_text(body)


def question_text(trajectory: Trajectory) -> str:
    """The question. Where the record has none: the last user message of the prompt, or the prompt if none is known."""
    if trajectory.question:
        return plain_text(trajectory.question)
    messages = _USER_MESSAGE.findall(trajectory.prompt)
    return plain_text(messages[-1] if messages else trajectory.prompt)


def beliefs_after(trajectory: Trajectory) -> list[float | None]:
    """The belief after each turn and its observation; `None` for the last turn."""
    return [*trajectory.beliefs[1:], None]


def worth_reading(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Positions of the rollouts to read first, by what they show: the best, the worst, an odd one, where there are."""

    def outcome(i: int) -> float:
        return trajectories[i].outcome or 0.0

    def gains(i: int) -> list[float]:
        return [turn.info_gain or 0.0 for turn in trajectories[i].turns]

    def last_belief(i: int) -> float:
        return trajectories[i].turns[-1].belief or 0.0

    scored = [i for i, each in enumerate(trajectories) if each.outcome is not None]
    highest, lowest = (choose(map(outcome, scored), default=0.0) for choose in (max, min))
    right = [i for i in scored if outcome(i) == highest > 0]
    wrong = [i for i in scored if outcome(i) == lowest and i not in right]
    choices: list[tuple[str, list[int], Callable[[int], Any]]] = [
        (
            "Right, after the most searches and the largest gain",
            right,
            lambda i: (len(gains(i)), max(gains(i), default=0.0)),
        ),
        ("Wrong, with the largest drop of the belief", wrong, lambda i: -min(gains(i), default=0.0)),
        ("Wrong, in spite of its belief in the right answer", wrong, last_belief),
        ("Right, in spite of its belief in other answers", right, lambda i: -last_belief(i)),
    ]
    chosen: dict[str, int] = {}
    for label, candidates, key in choices:
        if left := [i for i in candidates if i not in chosen.values()]:
            chosen[label] = max(left, key=key)
    return dict(list(chosen.items())[:3])


def format_belief(value: float) -> str:
    """A probability in a few characters: `0.42`, `0.003`, `2e-5`."""
    if value == 0 or value >= 9.5e-5:
        return f"{value:.{2 if value == 0 or value >= 0.095 else 3 if value >= 9.5e-4 else 4}f}"
    return f"{value:.0e}".replace("e-0", "e-")


def format_gain(value: float) -> str:
    """A gain with its sign, in the format of [`format_belief`]."""
    return ("+" if value >= 0 else "−") + format_belief(abs(value))
