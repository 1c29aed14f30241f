"""`igpo plot`: the numbers of its figures, what it reads, and what it writes."""

import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.evaluation.curves import (
    Run,
    band,
    beliefs_by_turn,
    curves_of,
    group_runs,
    part_of,
    read_run,
    reliability,
)
from igpo_trl.evaluation.figures import plot_runs
from igpo_trl.trajectory import Trajectory, Turn, write_jsonl


def rollout(step=0, group=0, beliefs=(0.1, 0.5), outcome=1.0, advantage=1.0, prompt="q"):
    gains = [None if b is None else b - a for a, b in zip(beliefs, beliefs[1:], strict=False)] + [None]
    turns = [Turn("text", belief=b, info_gain=g, advantage=advantage) for b, g in zip(beliefs, gains, strict=True)]
    return Trajectory(f"{prompt}{group}", turns, ["a"], outcome, {"answer_reward": outcome}, step, group)


def make_run(folder, steps=20, seed=0, beliefs=True):
    """Rollouts whose belief grows with the step, and is right about the outcome."""
    draw = random.Random(seed)
    rollouts = []
    for step in range(steps):
        for group in range(3):
            for _ in range(4):
                final = min(0.95, 0.2 + 0.6 * step / steps + draw.uniform(-0.15, 0.15))
                path = [0.1, 0.3, final][-draw.randint(1, 3) :] if beliefs else [None, None]
                rollouts.append(
                    Trajectory(
                        f"question {group}",
                        [Turn("text", belief=b, info_gain=None if b is None else 0.1, advantage=0.5) for b in path],
                        ["a"],
                        float(draw.random() < final),
                        step=step,
                        group=group,
                    )
                )
    write_jsonl(folder / "trajectories" / "rank0.jsonl", rollouts)
    return folder


# -------------------------------------------------------------------------------------------------------------- runs


def test_runs_that_differ_in_a_number_are_seeds(tmp_path):
    for name in ("igpo-seed0", "igpo-seed1", "grpo_2", "grpo_3", "7", "lm-lr1e4-seed5/train", "lm-lr1e4-seed6/train"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(path) for path in sorted(tmp_path.iterdir()) if "lm" not in path.name]
    groups = group_runs([*paths, *(str(path) for path in sorted(tmp_path.glob("lm*/train")))])
    assert {name: [p.name for p in of] for name, of in groups.items()} == {
        "7": ["7"],
        "grpo": ["grpo_2", "grpo_3"],
        "igpo": ["igpo-seed0", "igpo-seed1"],
        "lm-lr1e4": ["train", "train"],
    }
    named = group_runs([f"Ours={tmp_path}/igpo*,{tmp_path}/7", f"{tmp_path}/grpo_2"])
    assert {name: len(of) for name, of in named.items()} == {"Ours": 3, "grpo": 1}
    (tmp_path / "lr=1").mkdir()
    assert list(group_runs([f"{tmp_path}/lr=1"])) == ["lr"]
    with pytest.raises(FileNotFoundError, match=r"no such run: .*nothing\*"):
        group_runs([f"x={tmp_path}/nothing*"])


def test_curves_come_from_metrics_or_else_from_records(tmp_path):
    records = make_run(tmp_path / "run", steps=4)
    of_records = curves_of(read_run(records))
    assert list(of_records["reward"]) == [1, 2, 3, 4] and set(of_records) == {
        *("reward", "turns", "belief", "gain", "collapse", "no_advantage")
    }
    lines = [
        {"step": 2, "reward": 0.25, "rollout/turns/mean": 3.0, "collapse/outcome": 0.5, "belief/final": None},
        {"step": 2, "eval_f1": 0.75},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew'
    (records / "metrics.jsonl").write_text(text)
    assert curves_of(read_run(records)) == {
        "reward": {2: 0.25},
        "f1": {2: 0.75},
        "turns": {2: 3.0},
        "collapse": {2: 0.5},
    }
    (records / "metrics.jsonl").unlink()
    (records / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
    assert curves_of(read_run(records))["reward"] == {2: 0.25}
    with pytest.raises(FileNotFoundError, match="no rollouts"):
        read_run(tmp_path)


def test_collapse_of_records():
    rollouts = [rollout(1, 0), rollout(1, 0), rollout(1, 1, outcome=0.0), rollout(1, 1, advantage=0.0)]
    rollouts += [rollout(1, 2, advantage=0.0), rollout(1, 2, advantage=0.0), rollout(1, 3)]  # the last has no group
    curves = curves_of(Run(None, rollouts))
    assert curves["collapse"] == {2: 2 / 3} and curves["no_advantage"] == {2: 1 / 3}
    assert curves["gain"][2] == pytest.approx(0.4) and curves["turns"][2] == 2


# ----------------------------------------------------------------------------------------------------------- numbers


def test_an_interval_over_seeds_is_students():
    from scipy.stats import t

    seeds = [{1: 0.1, 2: 0.4, 3: 1.0}, {1: 0.3, 2: 0.5}, {1: 0.5, 2: 0.9}]
    result = band(seeds)
    assert result.steps.tolist() == [1, 2]
    np.testing.assert_allclose(result.mean, [0.3, 0.6])
    for i, values in enumerate(([0.1, 0.3, 0.5], [0.4, 0.5, 0.9])):
        interval = t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / math.sqrt(3))
        np.testing.assert_allclose([result.low[i], result.high[i]], interval)
    assert band(seeds[:2]).low is None


def test_a_point_is_the_mean_of_the_latest():
    curve = {i: float(i) for i in range(1, 6)}
    np.testing.assert_allclose(band([curve], span=3).mean, [1, 1.5, 2, 3, 4])


def test_parts_of_training():
    run = Run(None, [rollout(step) for step in range(20)])
    assert [r.step for r in part_of(run, 0.0, 0.1)] == [0, 1] and [r.step for r in part_of(run, 0.9, 1.0)] == [18, 19]
    evaluation = Run(None, [rollout(0)] * 3)
    assert len(part_of(evaluation, 0.9, 1.0)) == 3 and part_of(Run(None), 0.0, 0.1) == []


def test_beliefs_are_over_the_rollouts_that_reach_a_turn():
    long, short = rollout(beliefs=(0.1, 0.2, 0.6)), rollout(group=1, beliefs=(0.3, 0.4))
    points = beliefs_by_turn([long, short, rollout(beliefs=(None, None))])
    assert [point.mean for point in points] == pytest.approx([0.2, 0.3, 0.6])
    assert points[0].low == pytest.approx(0.1) and points[2].low is None
    assert len(beliefs_by_turn([long] + [short] * 199)) == 2  # one of two hundred is no curve


def test_reliability_of_a_calibrated_belief():
    draw = random.Random(1)
    beliefs = [draw.random() for _ in range(4000)]
    rollouts = [rollout(i, 0, (0.1, x), float(draw.random() < x)) for i, x in enumerate(beliefs)]
    result = reliability(rollouts)
    assert len(result.bins) == 10 and sum(each.number for each in result.bins) == 4000
    assert result.error < 0.03 and result.rank_correlation > 0.5
    inside = [each.outcome.low <= each.belief <= each.outcome.high for each in result.bins]
    assert sum(inside) >= 8
    always = reliability([rollout(i, 0, (0.1, 0.9), -2.0) for i in range(50)])
    assert always.error == pytest.approx(0.9) and math.isnan(always.rank_correlation)
    assert [each.number for each in always.bins] == [50]
    assert reliability([rollout(beliefs=(None, None)), rollout(outcome=None)]) is None


def test_small_beliefs_have_bins_of_their_own():
    rollouts = [rollout(i, 0, (0.01, 0.0005 + i / 1000), i % 2) for i in range(100)]
    assert len(reliability(rollouts, limit=0.1).bins) == 10 and len(reliability(rollouts).bins) == 1


# ------------------------------------------------------------------------------------------------------------ figures


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        make_run(folder / f"igpo-{seed}", seed=seed)
    make_run(folder / "grpo-0", beliefs=False)
    make_run(folder / "eval", steps=1)
    return folder


def test_the_command_writes_every_figure(runs, tmp_path):
    words = [str(path) for path in sorted(runs.iterdir())]
    result = CliRunner().invoke(app, ["plot", *words, "--smooth", "5", "--out", str(tmp_path / "figures")])
    assert result.exit_code == 0 and f"igpo: {words[2]}, {words[3]}, {words[4]}" in " ".join(result.output.split())
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("curves", "collapse", "beliefs", "reliability") for kind in ("svg", "png")
    }
    texts = {path.stem: texts_of(path) for path in (tmp_path / "figures").glob("*.svg")}
    assert {"igpo (3 seeds)", "grpo", "Reward", "Training step (mean of 5)"} <= texts["curves"]
    assert "igpo" in texts["beliefs"] and "grpo" not in texts["beliefs"]
    assert {"first tenth of training", "last tenth"} <= texts["beliefs"]
    assert any("calibration error" in text for text in texts["reliability"])


def texts_of(svg):
    return set(re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text(encoding="utf-8")))


def test_figures_are_the_same_each_time(runs, tmp_path):
    methods = {"$x_1$ & <b>": [read_run(runs / "eval")]}
    for folder in ("a", "b"):
        assert set(plot_runs(methods, tmp_path / folder)) == {"beliefs", "reliability"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert "$x_1$ &amp; &lt;b&gt;" in texts_of(tmp_path / "a" / "beliefs.svg")


@pytest.mark.parametrize("number", [1, 7])
def test_nothing_overlaps_and_nothing_is_cut_off(runs, number, monkeypatch, tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from igpo_trl.evaluation import figures

    drawn = {}
    monkeypatch.setattr(figures, "_save", lambda figure, stem: drawn.__setitem__(stem.name, figure))
    run = read_run(runs / "igpo-0")
    plot_runs({f"a method with a long name {i}": [run] for i in range(number)}, tmp_path)
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        for i, box in enumerate(boxes):
            assert box.x0 >= -1 and box.y0 >= -1, name
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, name
            for other in boxes[:i]:
                apart = (
                    box.x0 >= other.x1 - 1
                    or other.x0 >= box.x1 - 1
                    or box.y0 >= other.y1 - 1
                    or other.y0 >= box.y1 - 1
                )
                assert apart, name


def test_what_has_nothing_to_plot_is_an_error(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    write_jsonl(tmp_path / "rank0.jsonl", [rollout(beliefs=(None,), outcome=None)])
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "rank0.jsonl"), "--out", str(tmp_path / "figures")])
    assert result.exit_code == 1 and "nothing to plot" in result.output and not (tmp_path / "figures").exists()


def test_reading_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import igpo_trl.evaluation.figures, igpo_trl.evaluation.curves"
    subprocess.run([sys.executable, "-c", code], check=True)
