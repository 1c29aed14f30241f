"""What a generation batch says about the method: metrics of beliefs, gains and credit. Axes: N rollouts, K turns."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..advantages import Normalization, explained_variance, turn_price
from ..rollout.round_log import RoundLog

logger = logging.getLogger(__name__)


def without_infinite(rewards: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Rewards (N, functions) with NaN, as for a missing one, in place of infinite ones; warns of their functions."""
    if (infinite := rewards.isinf()).any():
        logger.warning(
            "%d infinite rewards of %s count as missing. Return a finite number, or None for no reward.",
            int(infinite.sum()),
            ", ".join(name for name, bad in zip(names, infinite.any(dim=0).tolist(), strict=False) if bad),
        )
    return rewards.masked_fill(infinite, torch.nan)


def belief_metrics(
    gains: torch.Tensor, beliefs: torch.Tensor, num_turns: torch.Tensor, outcome: torch.Tensor | None = None
) -> dict[str, float]:
    """
    Metrics of gains and beliefs.

    Args:
        gains (`torch.Tensor` of any shape): all gains.
        beliefs (`torch.Tensor` of shape (N, K)): probability of the answer before each turn, NaN where it is unknown.
        num_turns (`torch.Tensor` of shape (N,)): turns of each rollout.
        outcome (`torch.Tensor` of shape (N,), *optional*): to correlate with; NaN where no reward function applies.

    Returns:
        `dict[str, float]`: by name; only those for which there is something.
    """
    metrics = {}
    if len(gains):
        metrics["info_gain/mean"] = gains.mean().item()
        metrics["info_gain/std"] = gains.std(correction=0).item()
        metrics["info_gain/positive"] = (gains > 0).float().mean().item()
    if not beliefs[:, 0].isnan().all():
        last = beliefs.gather(1, (num_turns - 1)[:, None])[:, 0]
        metrics["belief/prompt"] = beliefs[:, 0].nanmean().item()
        metrics["belief/final"] = last.nanmean().item()
        if outcome is not None and (correlation := rank_correlation(last, outcome)) is not None:
            metrics["belief/outcome_corr"] = correlation
    return metrics


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Spearman's rank correlation of two vectors (N,) where neither is NaN; `None` if one of them is constant."""
    both = ~(a.isnan() | b.isnan())
    # Equal values share the mean of their ranks.
    ranks = torch.stack([(x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1) for x in (a[both], b[both])])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    return None if not norms.all() else (centred[0] @ centred[1] / norms.prod()).clamp(-1, 1).item()


class Watch:
    """
    Warns once if a metric has been bad for many batches in a row.

    Args:
        is_bad (`Callable`): of the metric's value.
        message (`str`): with places for the number of batches and the latest value.
        patience (`int`, *optional*, defaults to `20`): that number of batches.
    """

    carried = ("num_bad",)

    def __init__(self, is_bad: Callable[[float], bool], message: str, patience: int = 20):
        self._is_bad = is_bad
        self._message = message
        self._patience = patience
        self.num_bad = 0

    def update(self, value: float | None) -> None:
        """Take the value of a batch; `None`, where there is none, changes nothing."""
        if value is None:
            return
        self.num_bad = self.num_bad + 1 if self._is_bad(value) else 0
        if self.num_bad == self._patience:
            logger.warning(self._message, self._patience, value)


class FirstCalls:
    """Warns once if none of the first rollouts, all ranks together, contains a tool call that can be read."""

    carried = ("left", "seen", "malformed")

    def __init__(self, num_rollouts: int = 16):
        self.left = num_rollouts
        self.seen = self.malformed = 0

    def update(self, log: RoundLog) -> None:
        """Take the counts of a batch, gathered over ranks; without tools there are none."""
        if self.left <= 0:
            return
        if log.global_num_calls > log.global_num_malformed:
            self.left = 0
            return
        self.seen += log.global_num_rollouts
        self.malformed += log.global_num_malformed
        if self.seen >= self.left:
            self.left = 0
            logger.warning(
                "None of the first %d rollouts contains a tool call that can be read (%d calls could not be read). "
                "Training only reinforces what a model already does, and small models do not begin to call tools by "
                "themselves: warm-start it first (`igpo warm-start --help`), use a model that was trained to call "
                "tools, or say in the system prompt when to search.",
                self.seen,
                self.malformed,
            )


#: Price of a turn, in units of the advantage, beyond which training warns.
LARGE_PRICE = 0.2


def make_watches() -> dict[str, Watch]:
    """The metrics that a run is warned by."""
    return {
        "belief/outcome_corr": Watch(
            lambda correlation: correlation <= 0,
            "For %d batches in a row, rollouts that ended with a higher belief in the right answer were not rewarded "
            "more (`belief/outcome_corr` is at most 0, now %.2f). The gains may reward the wrong turns: compare "
            "`answer_template` with what the model writes, and look at trajectories (`igpo view`).",
        ),
        "credit/turn_price": Watch(
            lambda price: abs(price) > LARGE_PRICE,
            "For %d batches in a row, a further turn that changed nothing had a price far from 0 "
            "(`credit/turn_price`, now %+.2f in units of the advantage; positive: it costs), so this `normalization` "
            "rewards the number of turns, whatever they find. 'critic' and 'returns' do not.",
        ),
    }


def outcome_collapse(outcome: torch.Tensor, num_generations: int) -> float:
    """
    The share of groups whose outcomes are all equal.

    TRL's `frac_reward_zero_std` is the same for `scale_rewards="group"`; with `"batch"` it looks at the standard
    deviation of the whole batch, and is 0.

    Args:
        outcome (`torch.Tensor` of shape (N,)): NaN where no reward function applies.
        num_generations (`int`): group size.
    """
    groups = outcome.view(-1, num_generations)
    differs = groups.nan_to_num(-torch.inf).amax(dim=1) > groups.nan_to_num(torch.inf).amin(dim=1)
    return 1 - differs.float().mean().item()


def credit_metrics(
    info_gain: torch.Tensor,
    outcome: torch.Tensor,
    num_turns: torch.Tensor,
    num_generations: int,
    advantages: torch.Tensor,
    *,
    beliefs: torch.Tensor | None,
    normalization: Normalization,
    **options: Any,
) -> dict[str, float]:
    """
    Metrics of what the turns are trained with.

    Args:
        info_gain, outcome, num_turns, num_generations, beliefs, normalization, options: as for [`turn_advantages`].
        advantages (`torch.Tensor` of shape (N, K)): its result.

    Returns:
        `dict[str, float]`: by name.
    """
    moves = (advantages != 0).view(len(outcome) // num_generations, -1).any(dim=1)
    is_turn = torch.arange(advantages.shape[1]) < num_turns[:, None]

    def chosen(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    batch = (info_gain, outcome, num_turns, num_generations)
    of_gains = chosen("scale", "info_gain_weight", "std_floor")
    metrics = {
        "collapse/advantage": 1 - moves.float().mean().item(),
        "advantages/abs_mean": advantages[is_turn].abs().mean().item(),
        "credit/turn_price": turn_price(*batch, normalization=normalization, **of_gains),
    }
    if normalization == "critic":
        explained = explained_variance(
            *batch, beliefs=beliefs, **chosen("gamma", "info_gain_weight", "outcome_weight")
        )
        metrics |= {"credit/explained_variance": explained} if explained == explained else {}
    return metrics
