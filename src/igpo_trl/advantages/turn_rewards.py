"""The rewards of a batch, and what several estimators do with them."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class TurnRewards:
    """The rewards of a batch, as the estimators read them; everything is float64 or boolean."""

    gain: torch.Tensor  # (B, K): gain of each turn, 0 where there is none
    outcome: torch.Tensor  # (B, 1): reward of the last turn, 0 where there is none
    belief: torch.Tensor  # (B, K): probability of the answer before each turn, 0 where there is no turn
    is_gain: torch.Tensor  # (B, K): which turns have a gain
    turn_weight: torch.Tensor  # (B, K): 1 where there is a turn of a scored rollout, 0 elsewhere
    is_scored: torch.Tensor  # (B, 1): which rollouts have an outcome
    last: torch.Tensor  # (B, 1): index of the last turn
    num_generations: int  # group size G
    gain_weight: float  # applied after normalisation, as is that of the outcome
    outcome_weight: float
    gamma: float  # discount per turn
    gae_lambda: float
    scale: str  # "group", "batch" or "none"
    std_floor: float  # smallest divisor, in units of the reward

    @classmethod
    def of(
        cls,
        info_gain: torch.Tensor,
        outcome: torch.Tensor,
        num_turns: torch.Tensor,
        beliefs: torch.Tensor | None,
        **options: Any,
    ) -> "TurnRewards":
        """From the arguments of [`turn_advantages`]; `options` are the fields that are no tensors."""
        # Statistics in float64: sums then do not depend on padding or on the other groups to float32 precision.
        last = (num_turns - 1)[:, None]
        turn = torch.arange(info_gain.shape[1], device=info_gain.device)
        is_scored = ~outcome.isnan()[:, None]
        end = last.masked_fill(~is_scored, -1)
        turn_weight = (turn <= end).double()
        gain = _finite(info_gain)
        is_gain = (turn < end) & (gain == info_gain)
        gain = gain.mul_(is_gain).double()
        belief = gain.cumsum(dim=1).sub_(gain) if beliefs is None else _finite(beliefs).double()
        outcome = outcome.double()[:, None].masked_fill(~is_scored, 0.0)
        return cls(gain, outcome, belief.mul_(turn_weight), is_gain, turn_weight, is_scored, last, **options)

    def pooled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gains and outcomes (B, K) in one, and which turns have one of them."""
        return self.gain.scatter(1, self.last, self.outcome), self.is_gain.scatter(1, self.last, self.is_scored)

    def z_scores(
        self, values: torch.Tensor, mask: torch.Tensor, *, per_turn: bool = False, of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        z-scores (B, K) of the masked values within their group (and turn index, with `per_turn`), 0 elsewhere; or,
        with the same statistics, `of` other values.
        """
        num_turns = values.shape[1]
        weight = mask.view(-1, self.num_generations, num_turns).to(values.dtype)
        values = values.view(-1, self.num_generations, num_turns) * weight
        pool = (1,) if per_turn else (1, 2)
        mean, std = _mean_and_std(values, weight, pool)
        # Equal values must give exactly 0: their rounded mean can miss them, and rounding noise over its own std is 1.
        distinct = std > 1e-12 * mean.abs()
        if self.scale == "batch":
            _, std = _mean_and_std(values, weight, (0, *pool))
        divisor = std.clamp(min=self._floor) if self.scale != "none" else 1.0
        values = values if of is None else of.view_as(values)
        return values.sub_(mean).mul_(weight).mul_(distinct / divisor).view(-1, num_turns)

    def accumulate(self, z_gain: torch.Tensor, z_outcome: torch.Tensor) -> torch.Tensor:
        """Weigh normalised gains (B, K) and outcomes (B, 1), and add up what follows each turn, discounted."""
        z = z_gain.mul_(self.gain_weight).scatter_(1, self.last, self.outcome_weight * z_outcome)
        return self.following_(z, self.gamma)

    def weighted(self) -> torch.Tensor:
        """The reward (B, K) of every turn, weighted and not normalised; takes the place of the gains."""
        return self.gain.mul_(self.gain_weight).scatter_(1, self.last, self.outcome_weight * self.outcome)

    def following_(self, values: torch.Tensor, gamma: float) -> torch.Tensor:
        """Σ_{j ≥ k} γ^(j-k) values[:, j] for (B, K) values, where there is a turn; in place, one vector at a time."""
        for k in range(values.shape[1] - 2, -1, -1):
            values[:, k].add_(values[:, k + 1], alpha=gamma)
        return values.mul_(self.turn_weight)

    def over_root_mean_square(self, advantages: torch.Tensor) -> torch.Tensor:
        """Divide, in place, by the root mean square over the turns of the batch, not re-centred."""
        if self.scale == "none":
            return advantages
        root_mean_square = torch.linalg.vector_norm(advantages) / self.turn_weight.sum().clamp(min=1).sqrt()
        return advantages.div_(root_mean_square.clamp(min=self._floor))

    def first_return(self, returns: torch.Tensor) -> torch.Tensor | float:
        """Return of the first turn of the first scored rollout."""
        return returns[self.is_scored[:, 0].to(torch.uint8).argmax(), 0].clone() if len(returns) else 0.0

    @property
    def _floor(self) -> float:
        return max(self.std_floor, torch.finfo(self.gain.dtype).tiny)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """A copy with 0 for what is not finite."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _mean_and_std(
    values: torch.Tensor, weight: torch.Tensor, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Population statistics over `dims` where the 0/1 weight is 1; `values` are 0 elsewhere."""
    count = weight.sum(dim=dims, keepdim=True).clamp(min=1)
    mean = values.sum(dim=dims, keepdim=True) / count
    centred = (values - mean).mul_(weight)
    return mean, (centred.square_().sum(dim=dims, keepdim=True) / count).sqrt()
