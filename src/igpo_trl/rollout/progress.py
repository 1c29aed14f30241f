"""The progress bar of a batch of rollouts."""

from typing import Any

from tqdm import tqdm

DELAY = 3.0  # seconds: shorter rollouts have no bar


def rollout_bar(num_rollouts: int, shown: bool) -> Any:
    """
    A bar that appears on a terminal only and is removed at the end: training has one of its own, and logs want none.

    Args:
        num_rollouts (`int`): of the batch.
        shown (`bool`): whether to show it at all.
    """
    return tqdm(
        total=num_rollouts,
        desc="Rollouts",
        delay=DELAY,
        leave=False,
        miniters=0,  # a turn after which no rollout has ended is shown too
        disable=None if shown else True,  # `None`: unless it is a terminal
        bar_format="{desc}: {n_fmt}/{total_fmt} done |{bar:20}| {elapsed}{postfix}",
    )


def show_turn(bar: Any, turn: int, num_active: int, num_tokens: int) -> None:
    """Show the turn that is sampled next, by how many rollouts, and the speed at which tokens were sampled so far."""
    elapsed = bar.format_dict["elapsed"]
    speed = f", {num_tokens / elapsed:.0f} tokens/s" if num_tokens and elapsed else ""
    bar.set_postfix_str(f"turn {turn}, {num_active} active{speed}", refresh=False)  # which knows no delay
    bar.update(bar.total - num_active - bar.n)
