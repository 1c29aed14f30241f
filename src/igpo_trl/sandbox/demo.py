"""The demo: trains GRPO and IGPO from the same warm start on the same questions, and compares them in a table."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from ..report import plot_curves, plot_rollout, render_trajectory, worth_reading
from ..report.page import write_page
from ..trajectory import load_run, read_jsonl, record_files, write_jsonl
from .evaluate import Scores, roll_out
from .train import LABELS, Budget, TrainingRun, make_trainer, train_with_curve
from .warm_start import WarmStartConfig, cache_entry, warm_start
from .world import KINDS, make_dataset

# Streams of worlds, relative to the seed. The warm start uses stream `seed`.
_TRAIN, _CURVE, _TEST = 1_000_001, 1_000_002, 1_000_003


@dataclass(frozen=True)
class DemoPlan:
    """What a demo runs."""

    # Methods and KL weights
    methods: tuple[tuple[str, float], ...] = (("grpo_batch", 0.0), ("igpo_paper", 0.0), ("igpo_critic", 0.0))
    # Small groups of a policy that is seldom right: in most of them all outcomes are the same.
    budget: Budget = Budget(steps=100, rollouts=4, learning_rate=1e-3, answer_metric="em")  # of each method
    warm: WarmStartConfig = WarmStartConfig(kind="strangers")  # its seed is replaced by the demo's
    test_questions: int = 512  # held out; answered once greedily and once by sampling
    note: str = "One seed: small differences are due to chance, see benchmarks/learning.py."  # below the table


QUICK = DemoPlan(
    methods=(("grpo_batch", 0.0), ("igpo_critic", 0.0)),
    budget=Budget(steps=20, rollouts=4, learning_rate=1e-3, eval_every=5, answer_metric="em"),
    warm=WarmStartConfig(kind="strangers", epochs=1),
    test_questions=128,
    note="Quick: too few steps to learn anything. The numbers say nothing about the methods.",
)


def run_demo(output_dir: Path, quick: bool = False, seed: int = 0, plan: DemoPlan | None = None) -> None:
    """
    Trains GRPO and IGPO from one warm start with the same budget, evaluates them, prints a table, and writes learning
    curves and trajectories.

    A `quick` demo takes a minute or two instead of ten, and only shows that everything runs. Files of an earlier demo
    are replaced, but a quick demo does not replace a full one.

    Raises:
        FileExistsError: A quick demo would replace the files of a full one.
    """
    plan = plan or (QUICK if quick else DemoPlan())
    output_dir = Path(output_dir)
    methods = [method for method, _ in plan.methods]
    others = sorted(path.parent.name for path in output_dir.glob("*/test_greedy.jsonl"))
    if quick and set(others) - {"warm_start", *methods}:
        raise FileExistsError(f"{output_dir} has the files of a full demo. Choose another --output-dir for --quick.")
    output_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers; users cannot act on them
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more threads slow down operations this small
        try:
            files = _run(output_dir, seed, plan, console)
        finally:
            torch.set_num_threads(threads)
            if bars:
                transformers_logging.enable_progress_bar()
    console.print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Files:")
    for path, description in files.items():
        console.print(f"  {path}  [dim]{description}[/dim]", soft_wrap=True)


def _run(output_dir: Path, seed: int, plan: DemoPlan, console: Console) -> dict[Path, str]:
    warm = WarmStartConfig(**vars(plan.warm) | {"seed": seed})
    entry = cache_entry(warm)
    origin = "cached in" if entry.exists() else f"trained once on {warm.demonstrations:,} demonstrations, saved to"
    console.print(f"[bold]1. Warm start[/bold]: a policy that searches poorly, {origin} {entry}", soft_wrap=True)
    model = warm_start(warm)
    kind = plan.warm.kind
    questions = list(make_dataset(seed + _TEST, plan.test_questions, kind=kind))
    files: dict[Path, str] = {}
    table: list[tuple[str, TrainingRun | None, Scores, Scores]] = []
    for number, (method, beta) in enumerate(plan.methods, start=2):
        budget, folder = plan.budget, output_dir / method
        console.print(
            f"[bold]{number}. {LABELS[method]}[/bold]: {budget.steps} steps of {budget.questions} questions x "
            f"{budget.rollouts} rollouts, KL {beta:g}"
        )
        rollouts = folder / "trajectories" / "rank0.jsonl"
        for earlier in record_files(folder):
            earlier.unlink()
        data: dict[str, Any] = {"seed": seed, "data_seed": seed + _TRAIN, "kind": kind}
        trainer = make_trainer(method, model, folder, beta=beta, budget=budget, save_trajectories=True, **data)
        if not table:
            table.append(("Warm start", None, *_evaluate(trainer, questions, seed, output_dir / "warm_start", files)))
        run = train_with_curve(trainer, method, budget, seed + _CURVE, kind=kind)
        files[rollouts] = "every training rollout"
        table.append((LABELS[method], run, *_evaluate(trainer, questions, seed, folder, files)))
    console.print(_table(table, plan))
    runs = [run for _, run, _, _ in table if run is not None]
    plot_curves(_panels(runs), output_dir / "curves.png")
    files[output_dir / "curves.png"] = "held-out EM, reward and collapse during training"
    answered = list(read_jsonl(folder / "test_greedy.jsonl"))
    rollout = answered[next(iter(worth_reading(answered).values()), 0)]
    console.print(f"\n[bold]A rollout of {LABELS[method]}[/bold]")
    console.print(render_trajectory(rollout))
    plot_rollout(rollout, output_dir / "rollout.png")
    files[output_dir / "rollout.png"] = f"this rollout; others: igpo view {folder / 'test_greedy.jsonl'} --index N"
    try:
        write_page(output_dir / "page.html", {LABELS[method]: load_run(folder)})
        files[output_dir / "page.html"] = f"all training rollouts of {LABELS[method]}: open it in a browser"
    except ImportError as error:
        console.print(f"\n{error}")
    return files


def _evaluate(
    trainer: Any, questions: list[dict[str, Any]], seed: int, folder: Path, files: dict[Path, str]
) -> tuple[Scores, Scores]:
    """Greedy and sampled scores on the held-out questions. Writes the rollouts to `folder`."""
    scores = []
    for name, sample in (("greedy", False), ("sampled", True)):
        trajectories = roll_out(trainer, questions, sample=sample, seed=seed, beliefs=True)
        path = folder / f"test_{name}.jsonl"
        write_jsonl(path, trajectories)
        files[path] = f"{name} rollouts on the held-out questions, with the belief before each turn"
        scores.append(Scores.of(trajectories))
    return scores[0], scores[1]


def _table(rows: list[tuple[str, TrainingRun | None, Scores, Scores]], plan: DemoPlan) -> Table:
    all_hops = KINDS[plan.warm.kind].hops
    title = f"{plan.test_questions} held-out questions in new worlds"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    for name in ("policy", ""):
        table.add_column(name, no_wrap=True)
    for name in ("EM", *(f"{hops} hops" for hops in all_hops), "searches", "area", "collapse"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, run, greedy, sampled in rows:
        training = ["", ""]
        if run is not None:
            collapsed = sum(run.collapse) / len(run.collapse)
            training = [f"{run.area:.2f}", f"{collapsed:.0%}"]
        for name, scores, rest in (("greedy", greedy, training), ("sampled", sampled, ["", ""])):
            by_hops = [f"{scores.em_by_hops.get(hops, float('nan')):.2f}" for hops in all_hops]
            cells = [f"{scores.em:.2f}", *by_hops, f"{scores.searches:.1f}", *rest]
            table.add_row(label if name == "greedy" else "", name, *cells)
    table.caption = (
        "2 hops, …: EM of these questions. area: mean greedy EM over training.\n"
        "collapse: share of groups whose rollouts all had the same outcome.\n" + plan.note
    )
    return table


def _panels(runs: list[TrainingRun]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Learning curves of all runs, by panel and label."""
    by_label = {LABELS[run.method]: run for run in runs}
    em = {name: [(float(step), scores.em) for step, scores in run.curve.items()] for name, run in by_label.items()}
    return {
        "Held-out EM, greedy": em,
        "Reward in training": {name: _smooth(run.reward) for name, run in by_label.items()},
        "Groups with equal outcomes": {name: _smooth(run.collapse) for name, run in by_label.items()},
    }


def _smooth(values: list[float], span: int = 10) -> list[tuple[float, float]]:
    """Step and mean of the last `span` values."""
    return [(i + 1.0, sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span)) for i in range(len(values))]
