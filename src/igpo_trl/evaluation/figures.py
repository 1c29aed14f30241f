"""
Figures of runs, ready for a paper: learning curves over seeds, beliefs by turn, their reliability, collapse.

They are made from what a run has written, without torch and TRL. Drawing needs the extra `plots`.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .curves import COLLAPSE, CURVES, Reliability, Run, band, beliefs_by_turn, curves_of, part_of, reliability
from .intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of Okabe and Ito, which colour-blind readers can tell apart; lines differ in style as well, for grey prints.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Where the intervals of a curve end, whatever its seeds say.
RANGES = dict.fromkeys(("f1", "belief", *COLLAPSE), (0.0, 1.0)) | {"turns": (1.0, math.inf)}
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
INK, GREY, PALE = "#222222", "#6b6b6b", "#e2e2e2"


def plot_runs(methods: Mapping[str, Sequence[Run]], folder: str | Path, span: int | None = None) -> dict[str, str]:
    """
    Draws every figure for which the runs have the data, as SVG and PNG.

    Args:
        methods (mapping of `str` to sequence of [`Run`]): the runs of each method, one for each seed.
        folder (`str` or `Path`): where to write; it is created.
        span (`int`, *optional*): logs that a point of a curve averages. By default a twentieth of a run.

    Returns:
        `dict[str, str]`: what each figure shows, by its name without the suffix.

    Raises:
        ValueError: There is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    figures = {
        "curves": (_draw_curves(methods, [name for name in CURVES if name not in COLLAPSE], span), "learning curves"),
        "collapse": (_draw_curves(methods, COLLAPSE, span), "groups that teach GRPO, or IGPO, nothing"),
        "beliefs": (_draw_beliefs(methods), "belief before each turn, early and late in training"),
        "reliability": (_draw_reliability(methods), "outcome by the belief before the last turn"),
    }
    drawn = {name: (figure, text) for name, (figure, text) in figures.items() if figure is not None}
    if not drawn:
        raise ValueError("the runs have neither metrics over several steps nor beliefs: nothing to plot.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, (figure, _) in drawn.items():
        _save(figure, Path(folder, name))
    return {name: text for name, (_, text) in drawn.items()}


def _draw_curves(methods: Mapping[str, Sequence[Run]], names: Sequence[str], span: int | None) -> "Figure | None":
    by_method = {label: [curves_of(run) for run in runs] for label, runs in methods.items()}
    found: dict[str, dict[str, list[dict[int, float]]]] = defaultdict(dict)
    for label, runs in by_method.items():
        for name in names:
            curves = [curves[name] for curves in runs if name in curves]
            if curves and len(set.intersection(*map(set, curves))) > 1:
                found[name][label] = curves
    # Evaluations are few, and over the same questions each time.
    lengths = [len(curve) for name in found if name != "f1" for curves in found[name].values() for curve in curves]
    span = span or max([1, *(length // 20 for length in lengths)])
    bands = {
        name: {label: band(curves, 1 if name == "f1" else span) for label, curves in of_name.items()}
        for name, of_name in found.items()
    }
    if not bands:
        return None
    titles = {name: CURVES[name][0] for name in names if name in bands}
    collapse = names == COLLAPSE
    figure, panels = _panels(titles, share_x=True, share_y=collapse)
    for name, axes in panels.items():
        for label, curve in bands[name].items():
            colour, style = _look(label, methods)
            if curve.low is not None and curve.high is not None:
                limits = np.clip([curve.low, curve.high], *RANGES.get(name, (-np.inf, np.inf)))
                axes.fill_between(curve.steps, *limits, color=colour, alpha=0.18, linewidth=0)
            elif len(curve.seeds) > 1:
                axes.plot(curve.steps, curve.seeds.T, color=colour, linewidth=0.6, alpha=0.5)
            axes.plot(curve.steps, curve.mean, color=colour, linestyle=style, linewidth=1.5, label=label)
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.set_xlabel("Training step" + (f" (mean of {span})" if span > 1 and name != "f1" else ""))
    if collapse:
        top = max(curve.mean.max() for curves in bands.values() for curve in curves.values())
        axes.set_ylim(-0.02, min(1.02, max(0.25, 1.2 * top)))
    shown = [label for label in methods if any(label in curves for curves in bands.values())]
    _legend(figure, {f"{x} ({len(methods[x])} seeds)" if len(methods[x]) > 1 else x: _look(x, methods) for x in shown})
    return figure


def _draw_beliefs(methods: Mapping[str, Sequence[Run]]) -> "Figure | None":
    first = {"first tenth of training": (0.0, 0.1, "o", 0.6)}
    parts = first | {"last tenth": (0.9, 1.0, "s", 1.0)}
    points: dict[str, list[tuple[str, str, float, list[Interval]]]] = {}
    for label, runs in methods.items():
        trained = any(rollout.step for run in runs for rollout in run.rollouts)
        chosen = parts if trained else {"evaluation": (0.0, 1.0, "s", 1.0)}
        of_label = []
        for part, (start, end, marker, alpha) in chosen.items():
            by_turn = beliefs_by_turn([rollout for run in runs for rollout in part_of(run, start, end)])
            if by_turn:
                of_label.append((part, marker, alpha, by_turn))
        if of_label:
            points[label] = of_label
    if not points:
        return None
    figure, panels = _panels({label: label for label in points}, share_y=True)
    for label, axes in panels.items():
        colour, _ = _look(label, methods)
        for i, (_, marker, alpha, by_turn) in enumerate(points[label]):
            means = np.array([point.mean for point in by_turn])
            errors = [[p.mean - (p.mean if p.low is None else p.low) for p in by_turn],
                      [(p.mean if p.high is None else p.high) - p.mean for p in by_turn]]  # fmt: skip
            late = alpha == 1
            axes.errorbar(
                np.arange(len(means)) + 0.08 * i, means, yerr=np.maximum(errors, 0), color=colour, alpha=alpha,
                marker=marker, markersize=4, markerfacecolor=colour if late else "white",
                linestyle="-" if late else (0, (4, 2)), linewidth=1.3, elinewidth=0.9,
            )  # fmt: skip
        axes.set_xticks(range(max(len(by_turn) for *_, by_turn in points[label])))
        axes.set_xlabel("Turns taken")
        axes.set_ylim(bottom=0)
    next(iter(panels.values())).set_ylabel("Belief in the right answer")
    names = dict.fromkeys(part for of_label in points.values() for part, *_ in of_label)
    if len(names) > 1:
        _legend(figure, {part: (INK, (0, (4, 2)) if part in first else "-") for part in names})
    return figure


def _draw_reliability(methods: Mapping[str, Sequence[Run]]) -> "Figure | None":
    late = {label: [rollout for run in runs for rollout in part_of(run, 0.8, 1.0)] for label, runs in methods.items()}
    beliefs = [x for rollouts in late.values() for rollout in rollouts if (x := rollout.beliefs[-1]) is not None]
    if not beliefs:
        return None
    limit = _limit(beliefs)
    found = {name: result for name, rollouts in late.items() if (result := reliability(rollouts, limit)) is not None}
    if not found:
        return None
    return _draw_bins(found, {label: _look(label, methods)[0] for label in found}, limit)


def plot_calibration(found: Mapping[str, Reliability], stem: str | Path) -> None:
    """Draws the share of right answers by the belief, a panel for each data set, as `stem` with .svg and .png."""
    beliefs = [belief for result in found.values() for belief in result.beliefs]
    axes_names = ("Belief", "Share of right answers")
    _save(_draw_bins(found, dict.fromkeys(found, COLOURS[0]), _limit(beliefs), *axes_names), Path(stem))


def _limit(beliefs: Sequence[float]) -> float:
    """Where the axis of beliefs ends, so that small ones can be told apart."""
    return next((edge for edge in (0.1, 0.2, 0.5) if np.quantile(beliefs, 0.99) <= edge), 1.0)


def _draw_bins(
    found: Mapping[str, Reliability],
    colours: Mapping[str, str],
    limit: float,
    xlabel: str = "Belief before the last turn",
    ylabel: str = "Outcome",
) -> "Figure":
    figure, panels = _panels({label: label for label in found}, share_y=True)
    for label, axes in panels.items():
        result, colour = found[label], colours[label]
        shares, edges = np.histogram(np.clip(result.beliefs, 0, limit), bins=20, range=(0, limit))
        axes.bar(edges[:-1], 0.25 * shares / max(shares), width=np.diff(edges), align="edge", color=PALE, linewidth=0)
        axes.plot([0, limit], [0, limit], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
        for each in result.bins:
            low, high = each.outcome.low, each.outcome.high
            if low is not None and high is not None:
                axes.plot([each.belief] * 2, [low, high], color=colour, linewidth=1)
        axes.plot(
            [each.belief for each in result.bins],
            [each.outcome.mean for each in result.bins],
            color=colour, marker="o", markersize=3.5, linewidth=1,
        )  # fmt: skip
        correlation = (
            "" if math.isnan(result.rank_correlation) else f"\nrank correlation {result.rank_correlation:.2f}"
        )
        text = f"calibration error {result.error:.2f}{correlation}"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=7, color=INK)
        axes.set_xlim(-0.02 * limit, 1.02 * limit)
        axes.set_ylim(-0.03, 1.25)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel(xlabel)
    next(iter(panels.values())).set_ylabel(ylabel)
    return figure


def _look(label: str, methods: Iterable[str]) -> tuple[str, Any]:
    """Colour and style of a method, the same in every figure."""
    i = list(methods).index(label)
    return COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]


def _panels(
    titles: Mapping[str, str], share_x: bool = False, share_y: bool = False
) -> "tuple[Figure, dict[str, Axes]]":
    """A figure that touches no state of pyplot, with a panel for each title, at most three in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Install the extra: pip install "igpo-trl[plots]".') from error
    columns = 2 if len(titles) == 4 else min(len(titles), 3)
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(max(2.35 * columns, 3.0), 1.95 * rows + 0.1), facecolor="white", layout="constrained")
    panels: dict[str, Axes] = {}
    for i, (name, title) in enumerate(titles.items(), start=1):
        first = next(iter(panels.values()), None)
        axes = panels[name] = figure.add_subplot(
            rows, columns, i, sharex=first if share_x else None, sharey=first if share_y else None
        )
        axes.set_title(title, loc="left", fontsize=8.5, color=INK, parse_math=False)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=7.5, length=2, color=GREY)
        axes.xaxis.label.set(fontsize=8, color=INK)
        axes.yaxis.label.set(fontsize=8, color=INK)
    return figure, panels


def _legend(figure: "Figure", looks: Mapping[str, tuple[str, Any]], **style: Any) -> None:
    """A legend above the panels, of labels with their colours and line styles."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, ls=line, lw=1.5, label=label) for label, (colour, line) in looks.items()]
    columns = max(1, int(figure.get_figwidth() / (0.45 + 0.065 * max(map(len, looks)))))
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(looks) / columns))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8, **style)


def _save(figure: "Figure", stem: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "igpo", "svg.fonttype": "none"}):  # texts stay texts; equal files
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=300)
