"""
Does a language model learn to search, and with which method best? Trains SmolLM2-135M-Instruct from one warm start.

    python benchmarks/language_model.py world --model outputs/smollm2      # resumes where it was stopped
    python benchmarks/language_model.py hotpotqa --model outputs/smollm2 \
        --questions train.jsonl.gz --test test.jsonl.gz --index outputs/index
    python benchmarks/language_model.py world --print                      # the tables of what there is

It runs commands that a user would run: `igpo warm-start`, then for every method and seed `igpo train` and `igpo eval`
on questions that nothing was trained or chosen on. All methods start from the same model and share the learning rate:
the one of the grid with which the baseline, GRPO with batch scaling, has the highest mean outcome in the last ten
steps on the tuning seed. On a GPU a step has 64 rollouts, on a CPU 16.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from igpo_trl.evaluation import compare_runs, load_run, score_run
from igpo_trl.evaluation.curves import curves_of, read_run

METHODS = {
    "grpo_batch": ["--method", "grpo", "--scale_rewards", "batch", "--pad_to_longest", "false"],
    "igpo_paper": ["--recipe", "paper"],
    "igpo": [],
}
LABELS = {"grpo_batch": "GRPO, batch scaling", "igpo_paper": "IGPO as published", "igpo": "IGPO, default"}
BASELINE = "grpo_batch"
TUNING_SEED = 900
CONFIG = Path(__file__).parents[1] / "configs" / "smollm2-135m-world.yaml"


class Run(NamedTuple):
    """A training run."""

    method: str
    learning_rate: float
    beta: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-kl{self.beta:g}-{self.steps}-seed{self.seed}"


# ----------------------------------------------------------------------------------------------------------- commands


def igpo(*words: object, log: Path) -> None:
    """Runs a command of the package, and writes what it prints to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with log.open("a") as file:
        command = [sys.executable, "-m", "igpo_trl", *map(str, words)]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        raise RuntimeError(f"`igpo {words[0]}` failed, see {log}")


def warm_start(args: argparse.Namespace) -> None:
    """The model that all runs start from."""
    words = ["--data", args.questions, "--index", args.index, "--out", args.warm]
    words += ["--traces", args.traces, "--epochs", args.epochs, "--eval-questions", 0]  # the test questions tell more
    igpo("warm-start", args.model, *words, log=args.out / "warm-start.log")


def train(run: Run, args: argparse.Namespace) -> None:
    """Trains, resuming from the last checkpoint, and evaluates on the test questions."""
    folder = args.out / run.name
    if (folder / "eval" / "results.json").exists():
        return
    options: dict[str, Any] = {
        "model_name_or_path": args.warm,
        "questions": args.questions,
        "index": args.index,
        "output_dir": folder / "train",
        "num_eval_questions": 0,
        "learning_rate": run.learning_rate,
        "beta": run.beta,
        "seed": run.seed,
        "max_steps": run.steps,
    }
    if torch.cuda.is_available():
        options |= {"use_cpu": False, "num_generations": 8, "per_device_train_batch_size": 8}
        options |= {"gradient_accumulation_steps": 8}
    if any((folder / "train").glob("checkpoint-*")):
        options["resume_from_checkpoint"] = "true"
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    igpo("train", "--config", CONFIG, *words, *METHODS[run.method], *args.option, log=folder / "train.log")
    evaluate(folder / "train", folder / "eval", args)


def evaluate(model: Path, out: Path, args: argparse.Namespace) -> None:
    """Greedy rollouts on the test questions."""
    words = ["--model", model, "--config", CONFIG, "--data", args.test, "--index", args.index, "--limit", args.limit]
    igpo("eval", *words, "--out", out, "--batch-size", 64, log=out.parent / "eval.log")


def run_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Runs several at a time. One that fails does not stop the others."""

    def one(run: Run) -> None:
        started = time.perf_counter()
        try:
            train(run, args)
            print(f"{run.name}: done, {time.perf_counter() - started:.0f} s", flush=True)
        except RuntimeError as error:
            print(f"{run.name}: {error}", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(one, runs))


# ------------------------------------------------------------------------------------------------------------- results


def logged(run: Run, args: argparse.Namespace) -> list[dict[str, float]]:
    """What a run logged, by step."""
    states = sorted((args.out / run.name / "train").glob("checkpoint-*/trainer_state.json"), key=_step)
    if not states:
        return []
    return [row for row in json.loads(states[-1].read_text())["log_history"] if "reward" in row]


def _step(state: Path) -> int:
    return int(state.parent.name.removeprefix("checkpoint-"))


def final_outcome(run: Run, args: argparse.Namespace) -> float | None:
    """Mean outcome of the last ten steps of a complete run."""
    rows = logged(run, args)
    return statistics.fmean(row["reward"] for row in rows[-10:]) if len(rows) == run.steps else None


def tuning_runs(args: argparse.Namespace) -> list[Run]:
    """The baseline alone, on a seed that is used for nothing else."""
    return [Run(BASELINE, rate, args.beta, TUNING_SEED, args.tuning_steps) for rate in args.learning_rates]


def choose(args: argparse.Namespace) -> float | None:
    """The learning rate, once the tuning runs are complete."""
    outcomes = {run.learning_rate: final_outcome(run, args) for run in tuning_runs(args)}
    if None in outcomes.values():
        return None
    return max(outcomes, key=lambda rate: outcomes[rate] or 0.0)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds, by Student's t."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{values[0]:+.1f}"
    center = statistics.fmean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{center:+.1f} [{center - half:+.1f}, {center + half:+.1f}]"


def report(args: argparse.Namespace, runs: list[Run]) -> Iterator[str]:
    """Markdown tables of the runs that are complete."""
    start = load_run(args.out / "warm-eval")
    yield from ("", f"**{args.task}**: {len(start)} test questions, greedy. Warm start:", "", *scores_of(start), "")
    head = "F1 | EM | searches | in evidence | F1 less warm start [95 % of questions]"
    yield f"| method | seed | {head} | collapse, first to last 10 steps | belief–outcome | s/step |"
    yield "|---|---|" + "---|" * 8
    kept: dict[tuple[str, int], float] = {}
    for run in runs:
        if not (args.out / run.name / "eval" / "results.json").exists():
            continue
        rollouts = load_run(args.out / run.name / "eval")
        metrics = score_run(rollouts).sets["average"].metrics
        kept[run.method, run.seed] = 100 * metrics["f1"].mean
        difference = next(iter(compare_runs(start, rollouts).sets.values()))["f1"].difference
        rows = logged(run, args)
        cells = [f"{100 * metrics[name].mean:.1f}" for name in ("f1", "em")]
        cells += [f"{metrics['searches'].mean:.2f}", f"{100 * metrics['in_evidence'].mean:.0f} %"]
        cells += [f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"]
        collapse = list(curves_of(read_run(args.out / run.name / "train" / "trajectories"))["collapse"].values())
        cells += [" to ".join(f"{statistics.fmean(part):.2f}" for part in (collapse[:10], collapse[-10:]))]
        cells += [f"{mean(rows, 'belief/outcome_corr'):.2f}", f"{mean(rows, 'step_time'):.1f}"]
        yield f"| {LABELS[run.method]} | {run.seed} | {' | '.join(cells)} |"
    yield ""
    for method in METHODS:
        of_method = {seed: value for (m, seed), value in kept.items() if m == method}
        pairs = [value - kept[BASELINE, seed] for seed, value in of_method.items() if (BASELINE, seed) in kept]
        values = list(of_method.values())
        if values:
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            line = f"{LABELS[method]}: F1 {statistics.fmean(values):.1f}{spread} over {len(values)} seeds"
            yield line + (f"; less the baseline {interval(pairs)}" if pairs and method != BASELINE else "") + "  "


def scores_of(rollouts: Any) -> Iterator[str]:
    """The table of an evaluation."""
    metrics = score_run(rollouts).sets["average"].metrics
    names = [name for name in ("f1", "em", "searches", "in_evidence", "belief_start", "belief_end") if name in metrics]
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    yield f"| {' | '.join(f'{metrics[name].mean:.3f}' for name in names)} |"


def mean(rows: list[dict[str, float]], name: str) -> float:
    """Mean of a logged value; NaN if it was not logged."""
    values = [row[name] for row in rows if name in row]
    return statistics.fmean(values) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["world", "hotpotqa"])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--questions", default="world:train")
    parser.add_argument("--test", default="world:test")
    parser.add_argument("--index", type=Path, help="by default one of the world is made")
    parser.add_argument("--out", type=Path, default=Path("outputs/language-model"))
    parser.add_argument("--traces", type=int, default=400, help="of the warm start")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the warm start, which leaves much to learn")
    parser.add_argument("--limit", type=int, default=200, help="test questions")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tuning-steps", type=int, default=40)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--learning-rate", type=float, help="without tuning")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL term")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--option", nargs="+", default=[], help="further options of igpo train, as name=value")
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.option = [word for pair in args.option for word in ("--" + pair.split("=")[0], pair.split("=", 1)[1])]
    args.out /= args.task
    args.warm = args.out / "warm"
    if args.index is None:
        args.index = args.out / "index"
        if not args.print and not args.index.exists():
            igpo("index", "--corpus", "world", "--out", args.index, log=args.out / "index.log")
    if not args.print:
        warm_start(args)
        if not (args.out / "warm-eval" / "results.json").exists():
            evaluate(args.warm, args.out / "warm-eval", args)
        if args.learning_rate is None:
            run_all(tuning_runs(args), args)
    rate = args.learning_rate or choose(args)
    for run in tuning_runs(args) if args.learning_rate is None else ():
        print(f"tuning, learning rate {run.learning_rate:g}: outcome {final_outcome(run, args)}")
    if rate is None:
        raise SystemExit("The tuning runs are not complete.")
    print(f"learning rate {rate:g}", flush=True)
    runs = [Run(method, rate, args.beta, seed, args.steps) for seed in range(args.seeds) for method in args.methods]
    if not args.print:
        run_all(runs, args)
    print("\n".join(report(args, runs)))


if __name__ == "__main__":
    main()
