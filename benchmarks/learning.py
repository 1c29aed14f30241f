"""
Does IGPO learn better than GRPO? Trains every method in the sandbox on ten seeds, and compares them in pairs.

A cell is a kind of world and a number of groups per step. All methods share the cell's learning rate: that with which
GRPO with batch scaling has the largest area under the learning curve on two tuning seeds, which are used for nothing
else. Every seed has its own training questions, curve questions and test questions, which all methods share; all begin
with one warm start (in "strangers", that of `igpo demo`). Runs that the results file has are not repeated, so a
benchmark that was stopped resumes. Seeds are completed one after the other, cells of 2 groups first.

    python benchmarks/learning.py            # run what is missing, and print the tables
    python benchmarks/learning.py --print    # the tables of what there is
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from igpo_trl.files import read_json_lines

METHODS = ("grpo_batch", "igpo_critic", "igpo_critic_no_gain", "igpo_returns", "igpo_separate")
BASELINE = "grpo_batch"
MEASURES = {
    "area": "area under greedy EM",
    "sampled_em": "sampled EM",
    "searches": "searches",
    "half": "steps to half of the best",
    "greedy_em": "greedy EM",
}
# Streams of worlds: the number of a stream is the first number of the seed's block plus one of these.
TRAIN, CURVE, TEST = 1, 2, 3
TUNING_SEEDS = (900, 901)
LEARNING_RATES = (3e-4, 1e-3)
STEPS = {2: 160, 16: 50}  # by groups per step: about a minute on one core
KINDS = ("families", "strangers")
POINTS = 10  # of a learning curve, without that of the warm start


class Run(NamedTuple):
    """Everything that determines a row of the results file."""

    kind: str
    groups: int
    steps: int
    learning_rate: float
    seed: int
    method: str


Results = dict[Run, dict[str, Any]]


def run_one(run: Run, test_questions: int = 256) -> dict[str, Any]:
    """Makes the warm start (cached), trains and tests. Returns a row of the results file."""
    warnings.simplefilter("ignore", FutureWarning)
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from igpo_trl.sandbox.evaluate import Scores, roll_out
    from igpo_trl.sandbox.train import Budget, make_trainer, train_with_curve
    from igpo_trl.sandbox.warm_start import WarmStartConfig, warm_start
    from igpo_trl.sandbox.world import make_dataset

    block, kind = 10_000 + 10 * run.seed, run.kind
    model = warm_start(WarmStartConfig(kind=kind))
    budget = Budget(run.steps, run.groups, learning_rate=run.learning_rate, eval_every=max(1, run.steps // POINTS))
    seeds: dict[str, Any] = {"seed": run.seed, "data_seed": block + TRAIN}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run.method, model, Path(folder), budget=budget, kind=kind, **seeds)
        training = train_with_curve(trainer, run.method, budget, block + CURVE, " ".join(map(str, run)), kind)
        questions = list(make_dataset(block + TEST, test_questions, kind=kind))
        greedy = Scores.of(roll_out(trainer, questions))
        sampled = Scores.of(roll_out(trainer, questions, sample=True, seed=run.seed))
    return run._asdict() | {
        "area": training.area,
        "curve": {step: scores.em for step, scores in training.curve.items()},
        "greedy_em": greedy.em,
        "greedy_em_by_hops": greedy.em_by_hops,
        "sampled_em": sampled.em,
        "sampled_f1": sampled.f1,
        "searches": sampled.searches,
        "collapse": statistics.fmean(training.collapse),
        "seconds": training.seconds,
    }


def read_results(path: Path) -> Results:
    """The rows of a results file."""
    rows = (row for _, row in read_json_lines(path)) if path.exists() else ()
    return {Run(*(row[name] for name in Run._fields)): row for row in rows}


def run_all(runs: list[Run], results: Path, workers: int) -> Results:
    """Runs those that the file lacks, in order, and writes each result as soon as it is ready."""
    completed = read_results(results)
    todo = [run for run in runs if run not in completed]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them in {results}", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_one, run) for run in todo]):
            row = future.result()
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{' '.join(str(row[name]) for name in Run._fields)}: greedy EM {row['curve'][0]:.3f} to "
                f"{row['greedy_em']:.3f}, area {row['area']:.3f}, {row['seconds']:.0f} s",
                flush=True,
            )
    return read_results(results)


def steps_to(level: float, curve: dict[str, float]) -> float:
    """Step at which a curve first reaches a level, interpolated; its last step if it never does."""
    points = [(int(step), em) for step, em in curve.items()]
    for (before, low), (after, high) in zip([(0, -math.inf), *points], points, strict=False):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low) if before < after else after
    return points[-1][0]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def paired(values: list[float], baseline: list[float], digits: int = 3) -> str:
    """Mean difference, its 95 % interval (Student's t over seeds), and the share of seeds in which it is positive."""
    # Two-sided 95 % quantiles for 1 to 10 degrees of freedom
    quantiles = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    half = quantiles[min(n - 1, 10) - 1] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    interval = f"[{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return f"{mean:+.{digits}f} {interval}, {sum(d > 0 for d in differences)}/{n}"


def choose_learning_rate(results: Results, kind: str, groups: int) -> float | None:
    """The learning rate with the largest area on the tuning seeds, once all of them have been run."""
    areas = {
        rate: [results[run]["area"] for run in tuning_runs(kind, groups, (rate,)) if run in results]
        for rate in LEARNING_RATES
    }
    if min(map(len, areas.values())) < len(TUNING_SEEDS):
        return None
    return max(areas, key=lambda rate: statistics.fmean(areas[rate]))


def tuning_runs(kind: str, groups: int, rates: tuple[float, ...] = LEARNING_RATES) -> list[Run]:
    """The runs from which the learning rate of a cell is chosen: those of the baseline alone."""
    return [Run(kind, groups, STEPS[groups], rate, seed, BASELINE) for seed in TUNING_SEEDS for rate in rates]


def report(results: Results, kind: str, groups: int, seeds: list[int], methods: list[str]) -> str:
    """The Markdown tables of a cell: means, and paired differences. Only seeds that have every method count."""
    rate = choose_learning_rate(results, kind, groups)
    head = f"**{kind}, {groups} groups, {STEPS[groups]} steps**: "
    if rate is None:
        return head + "not tuned yet."
    runs = {seed: [Run(kind, groups, STEPS[groups], rate, seed, method) for method in methods] for seed in seeds}
    rows = {seed: [results[run] for run in of_seed if run in results] for seed, of_seed in runs.items()}
    rows = {seed: of_seed for seed, of_seed in rows.items() if len(of_seed) == len(methods)}
    head += f"learning rate {rate:g}; {len(rows)} of {len(seeds)} seeds."
    if not rows:
        return head
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for of_seed in rows.values():
        best = max(max(row["curve"].values()) for row in of_seed)
        for row in of_seed:
            for measure in MEASURES:
                value = steps_to(best / 2, row["curve"]) if measure == "half" else row[measure]
                values[row["method"], measure].append(value)
    start = [of_seed[0]["curve"]["0"] for of_seed in rows.values()]
    digits = {measure: 0 if measure == "half" else 2 if measure == "searches" else 3 for measure in MEASURES}
    heading = [f"| method | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    lines = [f"{head} Greedy EM of the warm start {spread(start)}.", "", *heading]
    for method in methods:
        cells = [spread(values[method, measure], digits[measure]) for measure in MEASURES]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if BASELINE in methods:
        lines += ["", f"Less {BASELINE}: mean [95 % interval], seeds in which it is positive.", "", *heading]
        for method in methods:
            if method != BASELINE:
                cells = [paired(values[method, m], values[BASELINE, m], digits[m]) for m in MEASURES]
                lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of worlds")
    parser.add_argument("--groups", nargs="+", type=int, choices=STEPS, default=list(STEPS))
    parser.add_argument("--print", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=Path("outputs/learning.jsonl"))
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    seeds = list(range(args.seeds))
    if not args.print:
        for groups in args.groups:
            tuning = [run for kind in args.kinds for run in tuning_runs(kind, groups)]
            results = run_all(tuning, args.results, args.workers)
            rates = {kind: choose_learning_rate(results, kind, groups) or math.nan for kind in args.kinds}
            print(f"{groups} groups: learning rates {rates}", flush=True)
            runs = [
                Run(kind, groups, STEPS[groups], rates[kind], seed, method)
                for seed in seeds
                for kind in args.kinds
                for method in args.methods
            ]
            run_all(runs, args.results, args.workers)
    results = read_results(args.results)
    for groups in args.groups:
        for kind in args.kinds:
            print(f"\n{report(results, kind, groups, seeds, args.methods)}")


if __name__ == "__main__":
    main()
