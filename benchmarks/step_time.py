"""The time that information gain adds to a training step: GRPO and IGPO in the sandbox, on the same rollout loop.

    python benchmarks/step_time.py [--steps 12] [--rounds 3]

Trains from one warm-started model, in turns and several times over: TRL's `GRPOTrainer`; `IGPOTrainer` with
`info_gain_weight=0`, which is GRPO on this package's rollout loop; and IGPO with beliefs scored against the
rollout's KV cache (the default), against the forward of the old log-probabilities (`reuse_prefixes=False` and two
iterations, for which TRL runs that forward), and against separate forwards. Prints medians over all steps but the
first two of each run, of the step and of the belief pass in it.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers.utils import logging

IGPO = "igpo_separate"
# Method of the sandbox, its options, and whether beliefs are scored against separate forwards.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "GRPO, TRL's loop": ("grpo", {}, False),
    "GRPO, our loop": (IGPO, {"info_gain_weight": 0.0}, False),
    "IGPO, rollout's cache": (IGPO, {}, False),
    "IGPO, separate forwards": (IGPO, {}, True),
    "GRPO, our loop, old log-probs": (
        IGPO,
        {"info_gain_weight": 0.0, "reuse_prefixes": False, "num_iterations": 2},
        False,
    ),
    "IGPO, forward of old log-probs": (IGPO, {"reuse_prefixes": False, "num_iterations": 2}, False),
}
COMPARED = {
    "IGPO, rollout's cache": "GRPO, our loop",
    "IGPO, separate forwards": "GRPO, our loop",
    "IGPO, forward of old log-probs": "GRPO, our loop, old log-probs",
}
WARM_UP = 2


def run(case: str, model: Path, steps: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of each generation batch with its optimizer steps, and of the belief pass in it."""
    from igpo_trl.beliefs.scorer import BeliefScorer
    from igpo_trl.sandbox.train import Budget, make_trainer

    method, options, separate_forwards = CASES[case]
    iterations = options.get("num_iterations", 1)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            method,
            model,
            Path(folder),
            budget=Budget(steps=steps * iterations),
            seed=seed,
            data_seed=seed + 1,
            **options,
        )
        step = trainer.training_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            ends.append(time.perf_counter())
            return result

        trainer.training_step = timed
        refuse = mock.patch.object(
            BeliefScorer, "can_use_cache", lambda *args, **kwargs: not separate_forwards and can(*args, **kwargs)
        )
        can = BeliefScorer.can_use_cache
        with refuse:
            trainer.train()
    batches = ends[iterations - 1 :: iterations]
    seconds = [b - a for a, b in zip(batches, batches[1:], strict=False)]
    belief = [row["belief/seconds"] for row in trainer.state.log_history if "belief/seconds" in row][1:]
    return seconds[WARM_UP:], belief[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="generation batches of 128 rollouts in each run")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is run")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small are slower on two

    from igpo_trl.sandbox.warm_start import warm_start

    model = warm_start()
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    beliefs: dict[str, list[float]] = {case: [] for case in CASES}
    by_round: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(args.rounds):
        for case in CASES:
            of_steps, of_beliefs = run(case, model, args.steps, 100 * number)
            seconds[case] += of_steps
            beliefs[case] += of_beliefs
            by_round[case].append(statistics.median(of_steps))

    print(
        f"Sandbox, 128 rollouts a batch, {args.rounds} runs of {args.steps} batches, one thread, torch "
        f"{torch.__version__}; medians\n"
    )
    print(f"{'':32}{'ms a batch':>12}{'belief ms':>11}{'share':>8}{'x GRPO':>8}  of the runs")
    for case, values in seconds.items():
        line = f"{case:32}{1e3 * statistics.median(values):12.0f}"
        if beliefs[case]:
            share = statistics.median(b / s for b, s in zip(beliefs[case], values, strict=True))
            line += f"{1e3 * statistics.median(beliefs[case]):11.0f}{share:8.1%}"
        if (grpo := COMPARED.get(case)) is not None:
            ratios = [a / b for a, b in zip(by_round[case], by_round[grpo], strict=True)]
            line += f"{statistics.median(ratios):8.2f}  " + " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(line)
    print("\ntarget: the belief pass takes at most 10 % of a step (IGPO, rollout's cache)")


if __name__ == "__main__":
    main()
