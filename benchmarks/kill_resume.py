"""
Kills training at random moments, resumes it until it is done, and compares the end with that of undisturbed runs: the
final weights bit for bit, records, log.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py                     # 20 kills, 8 kinds of runs
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 8 --seed 1

Every run is `igpo train` in a made-up world, with a small model that `make_tiny_model` teaches to search: full and
LoRA, `num_iterations` 1 and 2, one and two processes (gloo). All processes of a run get SIGKILL at the same moment, at
random from the beginning to the end of the undisturbed run.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

SIZE, STEPS, QUESTIONS, ROLLOUTS = 400, 12, 6, 8
TIMED = ("second", "time", "perf/", "latency", "train_loss")
Kind = tuple[bool, int, int]  # LoRA, iterations, processes


def make_files(folder: Path) -> None:
    """A corpus, a few questions so that training goes through them several times, and a model that calls the tool."""
    from igpo_trl.data.english import make_world
    from igpo_trl.sandbox.tiny_model import make_tiny_model

    if (folder / "model/config.json").is_file():
        return
    world = make_world(0, SIZE)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", world.corpus), ("questions", world.questions["train"][:64])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "num_layers": 2, "batch_size": 4}
    make_tiny_model(
        folder / "model", folder / "corpus.jsonl", folder / "questions.jsonl",
        minutes=30, max_steps=200, max_words=12, learning_rate=3e-3, show_progress=False, **options,
    )  # fmt: skip
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:QUESTIONS]), encoding="utf-8")


def words(files: Path, folder: Path, kind: Kind) -> list[str]:
    """The command line of a run."""
    from igpo_trl.sandbox.tiny_model import SYSTEM_PROMPT

    lora, iterations, processes = kind
    options = {
        "questions": files / "few.jsonl",
        "corpus": files / "corpus.jsonl",
        "model_name_or_path": files / "model",
        "output_dir": folder,
        "num_eval_questions": 0,
        "search_max_words": 12,
        "max_steps": STEPS,
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "num_generations": 4,
        "num_iterations": iterations,
        "per_device_train_batch_size": ROLLOUTS // processes,
        "max_completion_length": 320,
        "max_turn_length": 40,
        "system_prompt": SYSTEM_PROMPT,
        "learning_rate": 1e-3 if lora else 1e-4,
        "info_gain_weight_end": 0.5,
        "belief_model": "snapshot" if lora else "policy",
        "belief_snapshot_steps": 4,
        "save_trajectories": "true",
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "resume_from_checkpoint": "true",
        **({"use_peft": "true", "lora_r": 4, "lora_dropout": 0.1} if lora else {}),
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(arguments: list[str], rank: int, processes: int, port: int, log: str) -> None:
    """One process of a run; the fork server has imported everything."""
    import torch

    from igpo_trl.cli.train import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"} | {
            k: str(v) for k, v in names.items()
        }
    status = 0
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a communication thread that still lives would abort the interpreter on its way out


def start(context: Any, arguments: list[str], processes: int, log: Path, kill_after: float | None = None) -> float:
    """Run to the end, or kill all processes after some seconds. Returns the seconds that it took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [
        context.Process(target=train, args=(arguments, rank, processes, port, str(log))) for rank in range(processes)
    ]
    started = time.monotonic()
    for member in members:
        member.start()
    if kill_after is not None:
        time.sleep(max(0.0, started + kill_after - time.monotonic()))
        for member in members:
            member.kill()
    for member in members:
        member.join()
    if kill_after is None and any(member.exitcode for member in members):
        raise SystemExit(f"a run has failed: {log}\n{log.read_text(errors='replace')[-3000:]}")
    return time.monotonic() - started


def state_of(folder: Path) -> dict[str, Any]:
    """What two runs are compared by: weights, records without times, log without times."""
    from safetensors.numpy import load_file

    weights = {
        f"{path.name} {name}": value.tobytes()
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    records = []
    for path in sorted((folder / "trajectories").glob("rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            records.append((path.name, json.dumps({**json.loads(line), "seconds": None})))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    log = [{key: x for key, x in line.items() if not any(word in key for word in TIMED)} for line in lines]
    return {"weights": weights, "records": records, "log": log}


def last_step(folder: Path) -> str:
    steps = sorted(int(path.parent.name[11:]) for path in folder.glob("checkpoint-*/trainer_state.json"))
    return str(steps[-1]) if steps else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/kill_resume"))
    args = parser.parse_args()
    os.environ["IGPO_CACHE"] = str(args.out / "cache")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    files, began = args.out / "files", time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["igpo_trl.cli.train", "peft", "igpo_trl.sandbox.tiny_model"])
    making = context.Process(target=make_files, args=(files,))
    making.start()
    making.join()
    if making.exitcode:
        raise SystemExit("the files could not be made.")
    kinds: list[Kind] = list(product((False, True), (1, 2), (1, 2)))
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers", "accelerate", "peft"))
    print(f"{names}; {args.kills} kills, seed {args.seed}\n", flush=True)
    columns = ("kill", "weights", "iterations", "processes", "killed at", "last checkpoint", "same weights", "records")
    print(f"| {' | '.join(columns)} | log |\n|{'---|' * (len(columns) + 1)}", flush=True)
    choice, equal = random.Random(args.seed), 0
    undisturbed: dict[Kind, tuple[float, dict[str, Any]]] = {}
    for number in range(args.kills):
        kind = kinds[number % len(kinds)]
        share = choice.random()
        name = f"{'lora' if kind[0] else 'full'}-{kind[1]}-{kind[2]}"
        if kind not in undisturbed:
            whole = args.out / name
            if not (whole / "seconds.json").is_file():
                shutil.rmtree(whole, ignore_errors=True)
                took = start(context, words(files, whole, kind), kind[2], args.out / f"{name}.log")
                (whole / "seconds.json").write_text(json.dumps(took))
            undisturbed[kind] = json.loads((whole / "seconds.json").read_text()), state_of(whole)
        seconds, expected = undisturbed[kind]
        folder, log = args.out / f"kill-{args.seed}-{number}", args.out / f"kill-{args.seed}-{number}.log"
        shutil.rmtree(folder, ignore_errors=True)
        start(context, words(files, folder, kind), kind[2], log, kill_after=share * seconds)
        reached = last_step(folder)
        start(context, words(files, folder, kind), kind[2], log)
        got = state_of(folder)
        same = {part: got[part] == expected[part] for part in expected}
        equal += all(same.values())
        shown = ["yes" if same[part] else "NO" for part in ("weights", "records", "log")]
        row = [
            number + 1,
            "LoRA" if kind[0] else "full",
            kind[1],
            kind[2],
            f"{share * seconds:.1f} of {seconds:.1f} s",
        ]
        print(f"| {' | '.join(map(str, [*row, reached, *shown]))} |", flush=True)
        if all(same.values()):
            shutil.rmtree(folder)
    for kind, (_, state) in undisturbed.items():  # or what comes after a kill would not matter
        moved = sum(line.get("grad_norm", 0) > 0 for line in state["log"])
        assert moved > 0.75 * STEPS, f"{kind}: only {moved} of {STEPS} steps have a gradient"
    print(f"\n{equal} of {args.kills} ended equal; {(time.monotonic() - began) / 60:.1f} minutes.")
    raise SystemExit(equal != args.kills)


if __name__ == "__main__":
    main()
