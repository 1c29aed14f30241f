"""
Does IGPO learn better than GRPO? Trains every method in the sandbox on several seeds, and compares them in pairs.

Every seed has its own warm start, training questions, curve questions and test questions, which all methods share. The
KL weight of each method is selected first, by the area under the learning curve on tuning seeds that are used for
nothing else. A run that was killed resumes from its results file.

    python benchmarks/learning.py --seeds 5
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from igpo_trl.files import read_json_lines

METHODS = ("grpo", "grpo_batch", "igpo_separate", "igpo_critic")
MEASURES = {
    "greedy_em": "greedy EM",
    "area": "area under EM curve",
    "sampled_em": "sampled EM",
    "sampled_f1": "sampled F1",
}
# Streams of worlds: the number of a stream is the first number of the seed's block plus one of these.
TRAIN, CURVE, TEST = 1, 2, 3
FIRST_TUNING_SEED = 900
# Options that a row of the results file must share with this run, and their defaults. Other rows are ignored.
SHARED_OPTIONS: dict[str, Any] = {"steps": 120, "test_questions": 512, "warm": {}}
Job = tuple[str, float, int]  # method, KL weight, seed


def run_job(job: Job, steps: int, test_questions: int, warm: dict[str, Any]) -> dict[str, Any]:
    """Makes the warm start (cached), trains and tests. Returns a row of the results file."""
    method, beta, seed = job
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

    block = 10_000 + 10 * seed
    model = warm_start(WarmStartConfig(seed=block, **warm))
    budget = Budget(steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            method, model, Path(folder), beta=beta, budget=budget, seed=seed, data_seed=block + TRAIN
        )
        questions = list(make_dataset(block + TEST, test_questions))
        base = Scores.of(roll_out(trainer, questions, sample=True, seed=seed))
        run = train_with_curve(trainer, method, budget, block + CURVE, f"seed {seed} {method} KL {beta:g}")
        greedy = Scores.of(roll_out(trainer, questions))
        sampled = Scores.of(roll_out(trainer, questions, sample=True, seed=seed))
    return {
        "method": method, "beta": beta, "seed": seed, "steps": steps, "test_questions": test_questions,
        "warm": warm, "base_em": base.em,
        "greedy_em": greedy.em, "greedy_f1": greedy.f1, "greedy_em_by_hops": greedy.em_by_hops,
        "sampled_em": sampled.em, "sampled_f1": sampled.f1, "searches": sampled.searches, "area": run.area,
        "curve": {step: scores.em for step, scores in run.curve.items()},
        "collapse": statistics.fmean(run.collapse), "seconds": run.seconds,
    }  # fmt: skip


def run_all(jobs: list[Job], results: Path, workers: int, **options: Any) -> list[dict[str, Any]]:
    """Results of all jobs. Jobs that the file lacks are run, and each result is written when it is ready."""
    completed = {}
    if results.exists():
        for _, row in read_json_lines(results):
            if all(row.get(name, default) == options[name] for name, default in SHARED_OPTIONS.items()):
                completed[row["method"], row["beta"], row["seed"]] = row
    todo = [job for job in jobs if job not in completed]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them in {results}", flush=True)
    prepare(sorted({seed for _, _, seed in todo}), workers, options["warm"])
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_job, job, **options) for job in todo]
        for future in as_completed(futures):
            row = future.result()
            completed[row["method"], row["beta"], row["seed"]] = row
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"seed {row['seed']} {row['method']} KL {row['beta']:g}: base EM {row['base_em']:.3f}, greedy EM "
                f"{row['greedy_em']:.3f}, area {row['area']:.3f}, {row['seconds']:.0f} s",
                flush=True,
            )
    return [completed[job] for job in jobs]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.3f}"


def paired(values: list[float], baseline: list[float]) -> str:
    """Mean difference, its 95 % interval (Student's t over seeds), and the share of seeds in which it is positive."""
    # Two-sided 95 % quantiles for 1 to 10 degrees of freedom
    quantiles = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    half = quantiles[min(n - 1, 10) - 1] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}], {sum(d > 0 for d in differences)}/{n}"


def report(rows: list[dict[str, Any]], betas: dict[str, float], methods: list[str], seeds: list[int]) -> str:
    """The Markdown tables: means, and paired differences to GRPO and to GRPO with batch scaling."""
    values = {
        (method, measure): [
            row[measure] for seed in seeds for row in rows if (row["method"], row["seed"]) == (method, seed)
        ]
        for method in methods
        for measure in (*MEASURES, "searches", "collapse", "seconds")
    }
    for method in methods:
        chosen = [row for seed in seeds for row in rows if (row["method"], row["seed"]) == (method, seed)]
        for hops in ("2", "3"):
            values[method, hops] = [{str(k): v for k, v in r["greedy_em_by_hops"].items()}[hops] for r in chosen]
    base = [next(row["base_em"] for row in rows if row["seed"] == seed) for seed in seeds]
    lines = [f"{len(seeds)} seeds; sampled EM of the warm start {spread(base)}.", ""]
    lines.append(
        "| method | KL | " + " | ".join(MEASURES.values()) + " | greedy EM 2 / 3 hops | searches | collapse | s/run |"
    )
    lines.append("|---|---|" + "---|" * (len(MEASURES) + 4))
    for method in methods:
        cells = [spread(values[method, measure]) for measure in MEASURES]
        cells.append(" / ".join(f"{statistics.fmean(values[method, hops]):.2f}" for hops in ("2", "3")))
        cells += [f"{statistics.fmean(values[method, m]):.2f}" for m in ("searches", "collapse")]
        cells.append(f"{statistics.fmean(values[method, 'seconds']):.0f}")
        lines.append(f"| {method} | {betas[method]:g} | " + " | ".join(cells) + " |")
    for baseline in ("grpo", "grpo_batch"):
        if baseline not in methods:
            continue
        lines += ["", f"Paired difference to {baseline}: mean [95 % interval], seeds in which it is positive.", ""]
        lines.append("| method | " + " | ".join(MEASURES.values()) + " |")
        lines.append("|---|" + "---|" * len(MEASURES))
        for method in methods:
            if method != baseline:
                cells = [paired(values[method, m], values[baseline, m]) for m in MEASURES]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of test seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tuning-seeds", type=int, default=1, help="number of seeds for selecting the KL weight")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1], help="KL weights to select from")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--test-questions", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("outputs/learning.jsonl"))
    parser.add_argument("--warm-start", type=json.loads, default={}, help="JSON options of WarmStartConfig")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    options = {"steps": args.steps, "test_questions": args.test_questions, "warm": args.warm_start}

    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + args.tuning_seeds)
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    tuning = [(method, beta, seed) for seed in tuning_seeds for method in args.methods for beta in args.betas]
    rows = run_all(tuning, args.results, args.workers, **options)
    area = {
        (method, beta): statistics.fmean(r["area"] for r in rows if (r["method"], r["beta"]) == (method, beta))
        for method in args.methods
        for beta in args.betas
    }
    betas = {method: max(args.betas, key=lambda beta: area[method, beta]) for method in args.methods}
    print("KL weight by area on the tuning seeds:", {f"{m} {b:g}": round(a, 3) for (m, b), a in area.items()})
    jobs = [(method, betas[method], seed) for seed in seeds for method in args.methods]
    rows = run_all(jobs, args.results, args.workers, **options)
    print("\n" + report(rows, betas, args.methods, seeds))


def prepare(seeds: list[int], workers: int, warm: dict[str, Any]) -> None:
    """Trains the warm starts that are not cached yet, so that no two runs train the same one."""
    if not seeds:
        return
    print(f"Warm starts of the seeds {', '.join(map(str, seeds))}, unless they are cached", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_prepare_one, seeds, [warm] * len(seeds)))


def _prepare_one(seed: int, warm: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    from igpo_trl.sandbox.warm_start import WarmStartConfig, warm_start

    warm_start(WarmStartConfig(seed=10_000 + 10 * seed, **warm))


if __name__ == "__main__":
    main()
