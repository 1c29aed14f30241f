"""
Does a language model learn to search, and with which method best? Trains SmolLM2-135M-Instruct from one start.

    igpo get smollm2 outputs/smollm2
    python benchmarks/language_model.py world            # run what is missing, and print the table
    python benchmarks/language_model.py hotpotqa --questions train.jsonl.gz --test test.jsonl.gz --index outputs/index
    python benchmarks/language_model.py world --print    # the table of what there is

It runs commands that a user would run: for every method and seed `igpo train`, and `igpo eval` on questions that
nothing was trained or chosen on. In the world everything starts from the adapter of examples/smollm2-world; on
HotpotQA from one that `igpo warm-start` makes first. All methods share the learning rate and the number of rollouts:
on a GPU a step has 64, on a CPU 16. Runs that the results file has are not repeated, and one that was stopped resumes.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from igpo_trl.evaluation import load_run
from igpo_trl.evaluation.curves import curves_of, read_run
from igpo_trl.evaluation.intervals import Interval, bootstrap_interval
from igpo_trl.evaluation.scores import echoes, question_values
from igpo_trl.files import read_json_lines
from igpo_trl.rewards import extract_answer

METHODS = {
    "grpo_batch": ["--method", "grpo", "--scale_rewards", "batch", "--pad_to_longest", "false"],
    "igpo_paper": ["--recipe", "paper"],
    "igpo": [],
}
LABELS = {"grpo_batch": "GRPO, batch scaling", "igpo_paper": "IGPO as published", "igpo": "IGPO, default"}
BASELINE = "grpo_batch"
ROOT = Path(__file__).parents[1]
PER_QUESTION = ("f1", "em", "searches", "in_evidence", "belief_end")


class Run(NamedTuple):
    """What determines a row of the results file. The model that all start from is a run of no steps."""

    task: str
    method: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-{self.steps}-seed{self.seed}"


Results = dict[Run, dict[str, Any]]


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


def train(run: Run, args: argparse.Namespace) -> None:
    """Trains, resuming from the last checkpoint."""
    folder = args.out / run.name
    if (folder / "train" / "adapter_model.safetensors").exists():
        return
    options: dict[str, Any] = {
        "model_name_or_path": args.start,
        "use_peft": False,  # trained further is the adapter of the start
        "questions": args.questions,
        "index": args.index,
        "output_dir": folder / "train",
        "num_eval_questions": 0,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "max_steps": run.steps,
        "save_steps": 5,
        "answer_metric": "em",  # F1 pays for words of the question
        "dtype": args.dtype,
        "bf16": args.dtype == "bfloat16",
    }
    if torch.cuda.is_available():
        options |= {"use_cpu": False, "num_generations": 8, "per_device_train_batch_size": 8}
        options |= {"gradient_accumulation_steps": 8}
    if any((folder / "train").glob("checkpoint-*")):
        options["resume_from_checkpoint"] = "true"
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    igpo("train", "--config", args.config, *words, *METHODS[run.method], log=folder / "train.log")


def evaluate(run: Run, args: argparse.Namespace) -> None:
    """Greedy rollouts on the test questions."""
    folder = args.out / run.name
    model = folder / "train" if run.steps else args.start
    words = [
        "--model",
        model,
        "--config",
        args.config,
        "--dtype",
        args.dtype,
        "--batch-size",
        64,
        "--limit",
        args.limit,
    ]
    igpo("eval", *words, "--data", args.test, "--index", args.index, "--out", folder / "eval", log=folder / "eval.log")


def run_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Runs those that the file lacks, several at a time. One that fails does not stop the others."""
    completed = read_results(args.results)

    def one(run: Run) -> None:
        started = time.perf_counter()
        try:
            if run.steps:
                train(run, args)
            evaluate(run, args)
            row = json.dumps(run._asdict() | measure(args.out / run.name, args))
            with args.results.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
            print(f"{run.name}: done, {time.perf_counter() - started:.0f} s", flush=True)
        except RuntimeError as error:
            print(f"{run.name}: {error}", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(one, [run for run in runs if run not in completed]))


def warm_start(args: argparse.Namespace) -> Path:
    """The adapter that the runs on HotpotQA start from."""
    folder = args.out / "warm"
    words = ["--data", args.questions, "--index", args.index, "--out", folder, "--save-adapter"]
    words += ["--traces", 200, "--lora-r", 16, "--eval-questions", 0]  # the test questions tell more
    igpo("warm-start", args.model, *words, log=args.out / "warm-start.log")
    return folder / "adapter"


# ------------------------------------------------------------------------------------------------------------- results


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the results file keeps of a run: values of the test questions, in order, and its curves, step by step."""
    rollouts = load_run(folder / "eval")
    ((_, values),) = question_values(rollouts).items()
    echoing = [echoes(extract_answer(r.turns[-1].text), r.answers, r.question or "") for r in rollouts]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    row: dict[str, Any] = {
        "device": f"{device}, {args.dtype}, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s)",
        "questions": len(values["f1"]),
        "echoes": round(statistics.fmean(echoing), 4),
        "scores": {
            name: [round(value, 3) for _, value in sorted(values[name].items())]
            for name in PER_QUESTION
            if name in values
        },
    }
    if (folder / "train").exists():
        run = read_run(folder / "train")
        row["curves"] = {
            name: [round(value, 4) for value in curve.values()] for name, curve in curves_of(run).items() if curve
        }
        for name in ("step_time", "belief/outcome_corr"):
            logged = [log[name] for log in run.logs if name in log]
            row[name] = round(statistics.fmean(logged), 3) if logged else None
    return row


def read_results(path: Path) -> Results:
    """The rows of a results file."""
    rows = (row for _, row in read_json_lines(path)) if path.exists() else ()
    return {Run(*(row[name] for name in Run._fields)): row for row in rows}


def difference(row: dict[str, Any], start: dict[str, Any], name: str) -> Interval:
    """Paired, question by question."""
    pairs = zip(row["scores"][name], start["scores"][name], strict=True)
    return bootstrap_interval([100 * (a - b) for a, b in pairs])


def of_seeds(values: list[float]) -> str:
    """Mean and 95 % interval over seeds, by Student's t."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{values[0]:+.1f}"
    center = statistics.fmean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{center:+.1f} [{center - half:+.1f}, {center + half:+.1f}]"


def first_and_last(curve: list[float]) -> str:
    """Means of the first and of the last ten steps."""
    return " to ".join(f"{statistics.fmean(part):.2f}" for part in (curve[:10], curve[-10:]))


def report(results: Results, runs: list[Run], start: Run) -> Iterator[str]:
    """The Markdown table of the runs that are complete, and the differences pooled over seeds."""
    if start not in results:
        yield "The start has not been evaluated."
        return
    before = results[start]
    yield f"**{start.task}**, {before['questions']} test questions, greedy; differences to the start [95 %]"
    yield ""
    test = "F1 | difference | EM | difference | searches | in evidence | belief at the end | echoes"
    yield f"| method | seed | {test} | training: outcome | turns | collapse | s/step |"
    yield "|---|---|" + "---|" * 12
    for run in [start, *runs]:
        if run not in results:
            continue
        row = results[run]
        cells = []
        for name in ("f1", "em"):
            cells.append(f"{100 * statistics.fmean(row['scores'][name]):.1f}")
            gain = difference(row, before, name)
            cells.append(f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]" if run.steps else "")
        mean = {name: statistics.fmean(values) for name, values in row["scores"].items()}
        cells += [f"{mean['searches']:.2f}", f"{100 * mean['in_evidence']:.0f} %", f"{mean['belief_end']:.2f}"]
        cells += [f"{100 * row['echoes']:.0f} %"]
        if run.steps:
            cells += [first_and_last(row["curves"][name]) for name in ("reward", "turns", "collapse")]
            cells += [f"{row['step_time']:.0f}"]
        else:
            cells += [""] * 4
        yield f"| {LABELS.get(run.method, 'start')} | {run.seed if run.steps else ''} | {' | '.join(cells)} |"
    yield ""
    for method in METHODS:
        rows = [results[run] for run in runs if run.method == method and run in results]
        if rows:
            pooled = [statistics.fmean(values) for values in zip(*(row["scores"]["f1"] for row in rows), strict=True)]
            gain = difference({"scores": {"f1": pooled}}, before, "f1")
            line = f"{LABELS[method]}, {len(rows)} seed(s): F1 {100 * statistics.fmean(pooled):.1f}, "
            line += f"less the start {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] over questions"
            baseline = {run.seed: results[run] for run in runs if run.method == BASELINE and run in results}
            pairs = [row for row in rows if row["seed"] in baseline]
            if pairs and method != BASELINE:
                gains = [difference(row, baseline[row["seed"]], "f1").mean for row in pairs]
                line += f"; less the baseline {of_seeds(gains)} over seeds"
            yield line + "  "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["world", "hotpotqa"])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="of the warm start")
    parser.add_argument("--start", type=Path, help="adapter that all runs start from, instead of the task's own")
    parser.add_argument("--questions", default="world:train")
    parser.add_argument("--test", default="world:test")
    parser.add_argument("--index", type=Path, help="by default one of the world is made")
    parser.add_argument("--out", type=Path, default=Path("outputs/language-model"))
    parser.add_argument("--results", type=Path, default=Path("outputs/language-model.jsonl"))
    parser.add_argument("--limit", type=int, default=300, help="test questions")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16", help="float32 on a processor without bfloat16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.config = ROOT / f"configs/smollm2-135m-{args.task}.yaml"
    args.out /= args.task
    args.results.parent.mkdir(parents=True, exist_ok=True)
    start = Run(args.task, "start", 0.0, 0, 0)
    runs = [
        Run(args.task, method, args.learning_rate, seed, args.steps) for seed in args.seeds for method in args.methods
    ]
    if not args.print:
        if args.index is None:
            args.index = args.out / "index"
            if not args.index.exists():
                igpo("index", "--corpus", "world", "--out", args.index, log=args.out / "index.log")
        if args.start is None:
            args.start = ROOT / "examples/smollm2-world" if args.task == "world" else warm_start(args)
        run_all([start, *runs], args)
    print("\n".join(report(read_results(args.results), runs, start)))


if __name__ == "__main__":
    main()
