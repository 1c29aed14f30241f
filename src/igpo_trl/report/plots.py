"""Plots with matplotlib: one rollout with the belief after each turn, and learning curves."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import encodable
from ..trajectory import Trajectory, Turn
from .text import beliefs_after, format_belief, format_gain, pieces, plain_text, question_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE, CARD = "#1f2933", "#7b8794", "#e4e7eb", "#f7f8fa"
BLUE, GREEN, RED = "#4a7fb5", "#2f9e6b", "#d1495b"
CURVES = ("#7b8794", "#2f9e6b", "#4a7fb5", "#d9822b", "#8e5ea2", "#d1495b")


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: str | Path, xlabel: str = "training step"
) -> None:
    """
    Plots learning curves, in panels side by side.

    Args:
        panels (mapping of `str` to mapping of `str` to sequence of `(x, y)`):
            By title of the panel and name of the curve, the points of the curve. A curve has the same colour in every
            panel. Points that are not finite are left out.
        path (`str` or `Path`): File to write, in the format of its suffix. Parent folders are created.
        xlabel (`str`, *optional*, defaults to `"training step"`): Label of the x axis.

    Raises:
        ValueError: `panels` is empty.
        ImportError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("got no panels, expected at least one: {title: {curve: [(x, y), ...]}}.")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: CURVES[i % len(CURVES)] for i, name in enumerate(names)}
    lines: dict[str, Any] = {}
    columns = min(len(panels), 3) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.6 * columns + 0.4, 2.7 * rows + 0.7)
    for i, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, i)
        for name, points in curves.items():
            finite = [point for point in points if math.isfinite(point[1])]
            x_and_y = zip(*finite, strict=True) if finite else ([], [])
            (lines[name],) = axes.plot(*x_and_y, color=colours[name], linewidth=1.8, label=name)
        axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
        axes.tick_params(colors=GREY, labelsize=8, length=0)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", integer=True)
        if i > len(panels) - columns:
            axes.set_xlabel(xlabel, fontsize=9, color=GREY)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.36 / figure.get_figheight()))
    handles = list(lines.values())
    figure.legend(handles=handles, loc="upper left", ncols=len(names), frameon=False, fontsize=9, labelcolor=INK)
    _save(figure, path)


# Layout of the plot of a rollout, in inches from the top left corner.
_WIDTH, _MARGIN, _LINE, _GAP = 9.6, 0.3, 0.185, 0.12
_CARD_WIDTH, _TEXT_LEFT, _BAR_LEFT, _BAR_WIDTH = 5.75, 0.65, 6.3, 2.3


def plot_rollout(trajectory: Trajectory, path: str | Path, max_lines: int = 4) -> None:
    """
    Plots one rollout: its transcript from top to bottom, and beside each turn a bar for the belief after it.

    The first bar is the belief before any turn. Each later bar shows the belief before the turn in blue, and what the
    turn added in green or removed in red. The number is the belief after the turn; the gain and the advantage of the
    turn are below it. A full bar is 1. If all beliefs are small, it is a round number above the largest one, and the
    plot says so.

    Args:
        trajectory ([`Trajectory`]): The rollout. Turns without a belief get no bar.
        path (`str` or `Path`): File to write, in the format of its suffix. Parent folders are created.
        max_lines (`int`, *optional*, defaults to `4`): Maximum number of lines for each part of a turn and each
            observation.

    Raises:
        ImportError: matplotlib is not installed.
    """
    scale = _scale([belief for belief in trajectory.beliefs if belief is not None])
    cards = [_turn_lines(turn, max_lines) for turn in trajectory.turns]
    question = _wrap(question_text(trajectory), 4, 52)
    heights = [max(len(lines), 2) * _LINE + 0.22 for lines in cards]
    header = max(len(question) * 0.23 + (0.24 if trajectory.answers else 0.0) + 0.3, 0.95)
    total = header + sum(heights) + _GAP * (len(cards) - 1) + _MARGIN

    figure = _figure(_WIDTH, total)
    axes: Axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(total, 0))
    axes.axis("off")
    _draw_header(axes, trajectory, question, scale)
    y = header
    for i, (turn, after) in enumerate(zip(trajectory.turns, beliefs_after(trajectory), strict=True)):
        middle = y + heights[i] / 2
        _draw_card(axes, y, heights[i], i + 1, cards[i])
        if scale is not None and after is not None:
            _draw_bar(axes, middle - 0.17, after if turn.belief is None else turn.belief, after, scale)
        last = i + 1 == len(cards)
        if last and trajectory.outcome is not None:
            colour = GREEN if trajectory.outcome > 0 else RED
            text = f"reward {trajectory.outcome:.2f}".replace("-", "−")
            _write(axes, _BAR_LEFT, middle + 0.03, text, 10.5, colour, fontweight="bold")
        elif turn.info_gain is not None:
            colour = GREEN if turn.info_gain >= 0 else RED
            text = f"gain {format_gain(turn.info_gain)}".replace("-", "−")
            _write(axes, _BAR_LEFT, middle + 0.14, text, 8.5, colour)
        if turn.advantage is not None:
            text = f"advantage {turn.advantage:+.2f}".replace("-", "−")
            _write(axes, _BAR_LEFT + _BAR_WIDTH, middle + (0.03 if last else 0.14), text, 8.5, GREY, ha="right")
        y += heights[i] + _GAP
    _save(figure, path)


def _write(axes: "Axes", x: float, y: float, text: str, size: float, colour: str = INK, **style: Any) -> None:
    axes.text(x, y, text, fontsize=size, color=colour, va="center", parse_math=False, **style)


def _draw_header(axes: "Axes", trajectory: Trajectory, question: Sequence[str], scale: float | None) -> None:
    """The question, its answers, and the belief before any turn."""
    for i, line in enumerate(question):
        _write(axes, _MARGIN, 0.34 + 0.23 * i, line, 11.5, fontweight="bold")
    if trajectory.answers:
        answers = textwrap.shorten("right answer: " + encodable(" | ".join(trajectory.answers)), 70, placeholder=" …")
        _write(axes, _MARGIN, 0.35 + 0.23 * len(question), answers, 9, GREY)
    if scale is not None:
        title = "belief in the right answer" + ("" if scale == 1 else f" (full bar: {scale:g})")
        _write(axes, _BAR_LEFT, 0.34, title, 9, GREY)
        if (start := trajectory.beliefs[0]) is not None:
            _draw_bar(axes, 0.48, start, start, scale)


def _turn_lines(turn: Turn, max_lines: int) -> list[tuple[str, dict[str, Any]]]:
    """The lines of one turn, with their styles."""
    styles: dict[str, dict[str, Any]] = {
        "think": {"colour": GREY, "style": "italic"},
        "call": {"colour": BLUE, "fontweight": "bold"},
        "answer": {"fontweight": "bold"},
        "text": {},
    }
    lines = []
    for piece in pieces(turn.text):
        text = f"answer: {piece.text}" if piece.kind == "answer" else piece.text
        lines += [(line, styles[piece.kind]) for line in _wrap(text, max_lines)]
    if observation := plain_text(turn.observation):
        lines += [(line, styles["text"]) for line in _wrap("→ " + observation, max_lines)]
    return lines or [("(no text)", styles["think"])]


def _draw_card(axes: "Axes", top: float, height: float, number: int, lines: Sequence[tuple[str, Any]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((_MARGIN, top), _CARD_WIDTH, height, boxstyle=shape, facecolor=CARD, edgecolor=PALE))
    first = top + height / 2 - (len(lines) - 1) * _LINE / 2
    _write(axes, _MARGIN + 0.19, first, str(number), 9, GREY, ha="center")
    for i, (text, style) in enumerate(lines):
        _write(axes, _TEXT_LEFT, first + i * _LINE, text, 8.5, **style)


def _draw_bar(axes: "Axes", top: float, before: float, after: float, scale: float) -> None:
    """A bar with `before` in blue and the change to `after` in green or red, and the number `after`."""
    from matplotlib.patches import Rectangle

    low, high = min(before, after), max(before, after)
    for start, stop, colour in ((0, scale, PALE), (0, low, BLUE), (low, high, GREEN if after >= before else RED)):
        left, width = _BAR_LEFT + _BAR_WIDTH * start / scale, _BAR_WIDTH * (stop - start) / scale
        axes.add_patch(Rectangle((left, top), width, 0.18, facecolor=colour, linewidth=0))
    _write(axes, _BAR_LEFT + _BAR_WIDTH + 0.12, top + 0.09, format_belief(after), 10.5, fontweight="bold")


def _scale(beliefs: Sequence[float]) -> float | None:
    """The belief of a full bar: 1, or 1, 2 or 5 times a power of ten if all are small. `None` without beliefs."""
    if not beliefs:
        return None
    largest = max(beliefs)
    if largest > 0.5 or largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= largest)


def _wrap(text: str, max_lines: int, width: int = 78) -> list[str]:
    return textwrap.wrap(text, width, max_lines=max_lines, placeholder=" …", break_on_hyphens=False)


def _figure(width: float, height: float) -> "Figure":
    """A figure that needs no display and does not touch the state of pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Install the extra: pip install "igpo-trl[plots]".') from error
    return Figure(figsize=(width, height), dpi=160, facecolor="white")


def _save(figure: "Figure", path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
