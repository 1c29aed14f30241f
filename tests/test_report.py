"""Transcripts and plots of rollouts."""

import io
import itertools
import sys

import pytest
from rich.console import Console

from igpo_trl.report import (
    Piece,
    beliefs_after,
    format_belief,
    format_gain,
    pieces,
    plot_curves,
    plot_rollout,
    question_text,
    render_trajectory,
    worth_reading,
)
from igpo_trl.trajectory import Trajectory, Turn

PNG = b"\x89PNG\r\n\x1a\n"


def search(query):
    return f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{query}"}}}}\n</tool_call><|im_end|>'


@pytest.fixture
def trajectory():
    response = "<tool_response>\nParis is the capital.\n</tool_response>"
    observation = f"\n<|im_start|>user\n{response}<|im_end|>\n<|im_start|>assistant\n"
    return Trajectory(
        prompt="<|im_start|>system\nSearch.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\n",
        turns=[
            Turn("<think>Look it up.</think>" + search("France"), observation, 20, 0.1, 0.5, 1.25),
            Turn(search("[bold]x[/bold] $y$"), observation, 9, 0.6, -0.2, -0.5),
            Turn("<answer>Paris</answer><|im_end|>", "", 5, 0.4, None, 0.75),
        ],
        answers=["Paris", "Paname"],
        outcome=1.0,
        rewards={"answer_reward": 1.0},
    )


def text_of(trajectory, width=24):
    console = Console(file=io.StringIO(), width=100)
    console.print(render_trajectory(trajectory, width))
    return console.file.getvalue()


def test_pieces_of_a_turn_in_order(trajectory):
    assert pieces(trajectory.turns[0].text) == [Piece("think", "Look it up."), Piece("call", 'search(query="France")')]
    assert pieces(trajectory.turns[2].text) == [Piece("answer", "Paris")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("<|im_end|>", []),
        ("plain  words\n<|im_end|>", [Piece("text", "plain words")]),
        ('<tool_call>{"name": "sear', [Piece("call", '{"name": "sear')]),
        ("<tool_call>[1]</tool_call>", [Piece("call", "[1]")]),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', [Piece("call", '{"name": "f", "arguments": "x"}')]),
        ("<think>cut off", [Piece("think", "cut off")]),
        ("so <answer> A </answer> B", [Piece("text", "so"), Piece("answer", "A"), Piece("text", "B")]),
    ],
)
def test_pieces_of_odd_turns(text, expected):
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>user\nWho?<|im_end|><|im_start|>assistant\n", "Who?"),
        ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n", "Who?"),
        ("<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant", "Who?"),
        ("<|im_start|>user\nA<|im_end|><|im_start|>assistant\nB<|im_end|><|im_start|>user\nC<|im_end|>", "C"),
        ("Just text", "Just text"),
        ("", ""),
    ],
)
def test_question(prompt, expected):
    assert question_text(Trajectory(prompt, [Turn("x")])) == expected


def test_each_turn_has_a_belief_before_and_after_it(trajectory):
    pairs = zip(trajectory.beliefs, beliefs_after(trajectory), strict=True)
    assert list(pairs) == [(0.1, 0.6), (0.6, 0.4), (0.4, None)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0.00"), (1, "1.00"), (0.421, "0.42"), (0.0314, "0.031"), (0.0002, "0.0002"), (2e-5, "2e-5")],
)
def test_belief_format(value, expected):
    assert format_belief(value) == expected
    assert format_gain(value) == "+" + expected
    if value:
        assert format_gain(-value) == "−" + expected


def test_transcript_shows_the_belief_after_each_turn(trajectory):
    lines = text_of(trajectory, width=10).splitlines()
    bars = [line for line in lines if "belief" in line]
    assert [bar.count("█") for bar in bars] == [1, 6, 4]
    assert [bar.split("gain")[1].strip() for bar in bars[1:]] == ["+0.50", "−0.20"]
    text = "\n".join(lines)
    for expected in ("Capital of France?", "Paris | Paname", "→ Paris is the capital.", "answer: Paris", "1.00"):
        assert expected in text
    # Texts of tools and policies are not interpreted as markup.
    assert "[bold]x[/bold]" in text
    assert "<|im_" not in text


def test_transcript_without_beliefs(trajectory):
    for turn in trajectory.turns:
        turn.belief = turn.info_gain = turn.advantage = None
    trajectory.outcome, trajectory.rewards, trajectory.answers = None, {}, []
    text = text_of(trajectory)
    assert "belief" not in text and "Outcome" not in text and "Answer  " not in text


def test_transcript_says_why_a_rollout_ended_without_an_answer(trajectory):
    assert "Ended by" not in text_of(trajectory)
    trajectory.stop_reason = "turn_limit"
    assert "Ended by  turn_limit" in text_of(trajectory)
    trajectory.stop_reason = "answered"
    assert "Ended by" not in text_of(trajectory)


def test_plot_of_a_rollout(trajectory, tmp_path):
    path = tmp_path / "new" / "rollout.png"
    plot_rollout(trajectory, path)
    assert path.read_bytes().startswith(PNG)
    plot_rollout(trajectory, path.with_suffix(".svg"))
    assert "svg" in path.with_suffix(".svg").read_text()[:300]


def test_bars_of_the_plot_are_the_beliefs(trajectory, tmp_path, monkeypatch):
    from matplotlib.patches import Rectangle

    from igpo_trl.report import plots

    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot_rollout(trajectory, tmp_path / "unused.png")
    axes = figures[0].axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    widths = [round(bar.get_width() / plots._BAR_WIDTH, 6) for bar in bars]
    # Per bar: the track, the belief that stays, and the change: 0.1; 0.1 to 0.6; 0.6 to 0.4.
    assert widths == [1, 0.1, 0, 1, 0.1, 0.5, 1, 0.4, 0.2]
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text in ("0.10", "0.60", "0.40")] == ["0.10", "0.60", "0.40"]
    assert [text for text in texts if "gain" in text] == ["gain +0.50", "gain −0.20"]
    assert [text for text in texts if "advantage" in text] == ["advantage +1.25", "advantage −0.50", "advantage +0.75"]
    assert "reward 1.00" in texts


@pytest.mark.parametrize("beliefs", [[None, None, None], [0.0, 0.0, 0.0], [1e-5, 3e-4, 1e-300]])
def test_plot_with_missing_or_small_beliefs(trajectory, tmp_path, beliefs):
    for turn, belief in zip(trajectory.turns, beliefs, strict=True):
        turn.belief = belief
    plot_rollout(trajectory, tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").read_bytes().startswith(PNG)


def test_plot_of_an_empty_turn(tmp_path):
    plot_rollout(Trajectory("", [Turn("")], outcome=-1.0), tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("panels", [1, 2, 4, 5])
def test_curves(tmp_path, panels):
    curves = {"GRPO": [(0, 0.1), (1, float("nan")), (2, 0.3)], "IGPO": [(0, 0.2), (2, 0.5)], "empty": []}
    plot_curves({f"panel {i}": curves for i in range(panels)}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_curves_need_a_panel(tmp_path):
    with pytest.raises(ValueError, match="got no panels"):
        plot_curves({}, tmp_path / "curves.png")


def test_missing_matplotlib_names_the_extra(trajectory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"igpo-trl\[plots\]"):
        plot_rollout(trajectory, tmp_path / "rollout.png")


def test_rollouts_worth_reading():
    def rollout(outcome, *beliefs):
        turns = [Turn("", belief=belief) for belief in beliefs]
        for turn, (before, after) in zip(turns, itertools.pairwise(beliefs), strict=False):
            turn.info_gain = after - before
        return Trajectory("", turns, outcome=outcome)

    rollouts = [
        rollout(1.0, 0.1, 0.9),
        rollout(1.0, 0.1, 0.2, 0.9),  # the most searches
        rollout(1.0, 0.1, 0.2, 0.3),
        rollout(0.0, 0.1, 0.9, 0.8),  # believes
        rollout(0.0, 0.9, 0.1, 0.1),  # drops
        rollout(None, 0.1, 1.0),
    ]
    chosen = worth_reading(rollouts)
    assert [(label.split(",")[0], i) for label, i in chosen.items()] == [("Right", 1), ("Wrong", 4), ("Wrong", 3)]
    assert list(worth_reading(rollouts[:2]).values()) == [1, 0]  # nothing is wrong where all are alike
    assert worth_reading(rollouts[5:]) == {}
