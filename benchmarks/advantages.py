"""
Processor time of `turn_advantages` on one core.

    python benchmarks/advantages.py [--rollouts 4096] [--turns 200] [--group 8]

For comparison, it also times GRPO's normalisation, which has one number per rollout instead of one per turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from igpo_trl.advantages import NORMALIZATIONS, turn_advantages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    gain = torch.randn(args.rollouts, args.turns)
    outcome = torch.rand(args.rollouts)
    num_turns = torch.randint(1, args.turns + 1, (args.rollouts,))

    def grpo() -> torch.Tensor:
        grouped = outcome.view(-1, args.group)
        return (grouped - grouped.mean(dim=1, keepdim=True)) / (grouped.std(dim=1, keepdim=True) + 1e-4)

    def igpo(normalization: str) -> Callable[[], torch.Tensor]:
        return lambda: turn_advantages(gain, outcome, num_turns, args.group, normalization=normalization, gamma=0.95)  # type: ignore[arg-type]

    print(f"{args.rollouts} rollouts in groups of {args.group}, up to {args.turns} turns, one thread")
    baseline = milliseconds(grpo, args.repeats)
    print(f"{'GRPO':12}{baseline:10.3f} ms")
    for normalization in NORMALIZATIONS:
        median = milliseconds(igpo(normalization), args.repeats)
        print(f"{normalization:12}{median:10.1f} ms   (target under 50)")


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time of the repeats, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - started))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
