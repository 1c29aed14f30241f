"""Transcripts for the terminal, with a bar for the belief after each turn."""

import textwrap
from typing import TYPE_CHECKING

from ..files import encodable
from ..trajectory import StopReason, Trajectory, Turn
from .text import beliefs_after, format_belief, format_gain, pieces, plain_text, question_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_turn(number: int, turn: Turn) -> "RenderableType":
    """What was sampled in a turn, for the terminal; it may be incomplete."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    styles = {"think": "italic dim", "call": "cyan", "answer": "bold magenta", "text": ""}
    head = Text(f"\nTurn {number}", style="bold").append(f"  {turn.num_tokens} tokens", style="dim")
    if turn.advantage is not None:
        head.append(f"  advantage {turn.advantage:+.2f}", style="dim")
    lines = [
        Padding(Text(f"{'answer: ' * (kind == 'answer')}{text}", style=styles[kind]), (0, 0, 0, 2), expand=False)
        for kind, text in pieces(turn.text)
    ]
    return Group(head, *lines)


def render_observation(observation: str, longest: int | None = None) -> "RenderableType":
    """
    What was read after a turn, for the terminal.

    Args:
        observation (`str`): The text, with the markers of the chat template.
        longest (`int`, *optional*): Show each result in a paragraph of its own, cut to so many characters. By default
            all of them are one paragraph.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    paragraphs = [observation] if longest is None else observation.split("\n\n")
    texts = [text for text in map(plain_text, paragraphs) if text]
    if longest is not None:
        texts = [textwrap.shorten(text, longest, placeholder=" …") for text in texts]
    return Group(*(Padding(Text(f"→ {text}", style="dim"), (0, 0, 0, 2), expand=False) for text in texts))


def render_belief(belief: float, gain: float | None = None, width: int = 24) -> "RenderableType":
    """A belief as a bar, and the gain that led to it."""
    from rich.text import Text

    filled = round(belief * width)
    line = Text("  belief ", style="dim")
    line.append("█" * filled, style="blue").append("░" * (width - filled), style="dim")
    line.append(f" {format_belief(belief)}", style="bold")
    if gain is not None:
        line.append(f"  gain {format_gain(gain)}", style="green" if gain >= 0 else "red")
    return line


def render_trajectory(trajectory: Trajectory, width: int = 24) -> "RenderableType":
    """
    The transcript of a rollout for the terminal, with a bar for the belief after each turn.

    Args:
        trajectory ([`Trajectory`]): The rollout.
        width (`int`, *optional*, defaults to `24`): Length of the bar of a belief of 1, in characters.

    Returns:
        A renderable for `rich.console.Console.print`.
    """
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = [Text.assemble(("Question  ", "bold"), question_text(trajectory))]
    if trajectory.answers:
        lines.append(Text.assemble(("Answer    ", "bold"), encodable(" | ".join(trajectory.answers))))
    if (before := trajectory.turns[0].belief) is not None:
        lines.append(render_belief(before, None, width))
    for number, (turn, after) in enumerate(zip(trajectory.turns, beliefs_after(trajectory), strict=True), start=1):
        lines += [render_turn(number, turn), render_observation(turn.observation)]
        if after is not None:
            lines.append(render_belief(after, turn.info_gain, width))
    rewards = ", ".join(f"{name} {value:.2f}" for name, value in trajectory.rewards.items() if value is not None)
    if trajectory.outcome is not None:
        rewards = f"{trajectory.outcome:.2f}" + (f"  ({rewards})" if rewards else "")
    if rewards:
        lines.append(Text.assemble("\n", ("Outcome   ", "bold"), rewards))
    if trajectory.stop_reason is not None and trajectory.stop_reason != StopReason.ANSWERED:
        lines.append(Text.assemble(("Ended by  ", "bold"), trajectory.stop_reason))
    return Group(*lines)
