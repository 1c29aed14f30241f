"""
Estimators of advantages against exact policy gradients, in search games small enough to enumerate.

    python benchmarks/credit.py [--batches 300]

For every estimator: the cosine of its mean gradient with the exact one (bias), the signal-to-noise ratio of the
gradient of one batch (the norm of the mean by the root of the summed variances), the mean cosine of one batch, and the
cosine of the advantages of turns with the true ones. The games are in `tests/games.py`; one thread.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpo_trl.advantages import turn_advantages

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from games import BELIEFS, GAMES, Quality, measure

ESTIMATORS: dict[str, dict[str, Any]] = {
    "GRPO": {"normalization": "separate", "info_gain_weight": 0.0},
    "GRPO, batch scaling": {"normalization": "separate", "info_gain_weight": 0.0, "scale": "batch"},
    "`joint`": {"normalization": "joint"},
    "`separate`": {"normalization": "separate"},
    "`per_turn`": {"normalization": "per_turn"},
    "`returns`": {"normalization": "returns"},
    "`critic`, weight 0": {"normalization": "critic", "info_gain_weight": 0.0},
    "`critic`, weight 1": {"normalization": "critic"},
}
CHOSEN = ("GRPO", "`returns`", "`critic`, weight 0", "`critic`, weight 1")
LAMBDAS, WEIGHTS = (0.0, 0.8, 0.9, 0.95, 1.0), (0.0, 0.5, 1.0, 2.0)
USELESS = "search is useless"
WITH_GRADIENT = [name for name in GAMES if name != USELESS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=300, help="batches per cell")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()

    def play(game: str, belief: str, groups: int, size: int, options: dict[str, Any]) -> Quality:
        generator = np.random.default_rng([groups, size])
        rollouts = GAMES[game].play(generator, args.batches, groups, size)
        return measure(rollouts, rollouts.beliefs(belief, generator), turn_advantages, **options)

    def over_games(belief: str, groups: int, size: int, options: dict[str, Any]) -> list[Quality]:
        return [play(game, belief, groups, size, options) for game in WITH_GRADIENT]

    for groups in (16, 2):
        found = {
            name: [play(game, "calibrated", groups, 8, options) for game in GAMES]
            for name, options in ESTIMATORS.items()
        }
        print(f"\n### {groups} groups of 8, calibrated beliefs\n")
        head = ["", *(f"{game}: cosine, SNR" for game in WITH_GRADIENT), f"{USELESS}: push"]
        cells = {
            name: [*(f"{number(q.cosine, 3)}, {q.snr:.2f}" for q in row[:-1]), f"{row[-1].push:+.2f}"]
            for name, row in found.items()
        }
        table(head, cells)
        print(f"\n### The same, over the games with a gradient ({groups} groups of 8)\n")
        head = [
            "",
            "lowest cosine",
            "mean SNR",
            "× GRPO's, mean (range)",
            "one batch's cosine",
            "credit of turns",
        ]
        table(head, {name: summary(row[:-1], found["GRPO"][:-1]) for name, row in found.items()})

    print("\n### Other numbers of rollouts, calibrated beliefs: lowest cosine, mean SNR, one batch's cosine\n")
    sizes = [(groups, size) for groups in (2, 4, 16) for size in (4, 8, 16)]
    table(
        ["", *CHOSEN],
        {
            f"{groups} groups of {size}": [
                brief(over_games("calibrated", groups, size, ESTIMATORS[name])) for name in CHOSEN
            ]
            for groups, size in sizes
        },
    )
    print("\n### Other beliefs, 16 groups of 8: lowest cosine, mean SNR, one batch's cosine\n")
    table(
        ["", *BELIEFS],
        {
            name: [brief(over_games(belief, 16, 8, options)) for belief in BELIEFS]
            for name, options in ESTIMATORS.items()
        },
    )
    for belief in ("calibrated", "noisy", "blind"):
        print(f"\n### λ and the weight of the gains, `critic`, 2 groups of 8, {belief} beliefs: the same three\n")
        grid = {}
        for lam in LAMBDAS:
            options = [{"normalization": "critic", "gae_lambda": lam, "info_gain_weight": w} for w in WEIGHTS]
            grid[f"λ = {lam}"] = [brief(over_games(belief, 2, 8, option)) for option in options]
        table(["", *(f"weight {w}" for w in WEIGHTS)], grid)
    print(f"\n{args.batches} batches per cell, {time.process_time() - started:.0f} s of one core.")


def number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def brief(found: Iterable[Quality]) -> str:
    found = list(found)
    cosines = [q.cosine for q in found]
    lowest = float("nan") if any(math.isnan(c) for c in cosines) else min(cosines)
    return f"{number(lowest, 3)}, {np.mean([q.snr for q in found]):.2f}, {np.mean([q.one_batch for q in found]):.2f}"


def summary(found: list[Quality], grpo: list[Quality]) -> list[str]:
    ratios = sorted(q.snr / base.snr for q, base in zip(found, grpo, strict=True))
    return [
        number(min(q.cosine for q in found), 3),
        f"{np.mean([q.snr for q in found]):.2f}",
        f"{np.mean(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{np.mean([q.one_batch for q in found]):.2f}",
        f"{np.mean([q.credit for q in found]):.2f}",
    ]


def table(head: list[str], rows: dict[str, list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for name, cells in rows.items():
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
