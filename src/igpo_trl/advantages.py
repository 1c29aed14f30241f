r"""Turn-level advantages: one function per estimator, and [`turn_advantages`], which picks one by name.

Pure functions on tensors. Axes: B rollouts in consecutive groups of G, K turns. Rollout i has `num_turns[i]` = K_i
turns; turn k < K_i - 1 is rewarded with its information gain, the last one with the outcome.

    name       compares a reward with                                          source
    joint      all rewards of the group                                        IGPO, Eq. 6
    separate   gains with the group's gains, outcomes with its outcomes        the IGPO authors' training script
    per_turn   gains with the group's gains at the same turn index             A²TGPO
    critic     a value fitted from the belief                                  this package

A new estimator is a function from [`TurnRewards`] to advantages, and a line in `ESTIMATORS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Normalization = Literal["joint", "separate", "per_turn", "critic"]
_SCALES: dict[bool | str, str] = {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}

# Ridge of the critic's fit in rows of the batch, and of its group levels in rollouts: little data moves little.
_RIDGE = 4.0


def turn_advantages(
    info_gain: torch.Tensor,
    outcome: torch.Tensor,
    num_turns: torch.Tensor,
    num_generations: int,
    *,
    normalization: Normalization = "separate",
    gamma: float = 1.0,
    scale: bool | str = True,
    info_gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    std_floor: float = 1e-2,
    beliefs: torch.Tensor | None = None,
    gae_lambda: float = 0.8,
) -> torch.Tensor:
    r"""
    Advantage of every turn, from its information gain and the outcome of its rollout (IGPO, arXiv 2510.14967).

    The estimators are [`joint_advantages`], [`separate_advantages`], [`per_turn_advantages`] and
    [`critic_advantages`]; their docstrings have the formulas.

    Degenerate cases of all of them: a rollout whose outcome is NaN (no reward function applied to it) leaves every
    pool and has advantage 0, as in TRL. A gain that is not finite counts as no reward of that turn; the rollout's
    other turns keep theirs.

    Args:
        info_gain (`torch.Tensor` of shape (B, K)): Gain of each turn (difference of probabilities, or of
            log-probabilities in nats). Read for `k < num_turns - 1` only.
        outcome (`torch.Tensor` of shape (B,)): Outcome reward of each rollout.
        num_turns (`torch.Tensor` of shape (B,)): Number of turns of each rollout, between 1 and K.
        num_generations (`int`): Group size G; rows `iG … (i+1)G - 1` answer the same question.
        normalization (`str`, *optional*, defaults to `"separate"`): Name of the estimator: `"joint"`, `"separate"`,
            `"per_turn"` or `"critic"`.
        gamma (`float`, *optional*, defaults to `1.0`): Discount per turn (not per token).
        scale (`bool` or `str`, *optional*, defaults to `True`): What to divide by: `True` or `"group"` the pool's
            standard deviation, `"batch"` that of the whole batch, `False` or `"none"` nothing. The critic divides by
            the root mean square over the batch unless this is `"none"`.
        info_gain_weight (`float`, *optional*, defaults to `1.0`): Weight of the gains, applied after normalisation
            (before it, a z-score would undo it).
        outcome_weight (`float`, *optional*, defaults to `1.0`): Weight of the outcome, likewise.
        std_floor (`float`, *optional*, defaults to `1e-2`): Smallest standard deviation divided by, in units of the
            reward, so that noise is not blown up to unit scale.
        beliefs (`torch.Tensor` of shape (B, K), *optional*): Probability of the answer before turn k; read by the
            critic only. Defaults to the running sum of `info_gain`, which is the belief relative to the prompt's.
        gae_lambda (`float`, *optional*, defaults to `0.8`): λ of the critic's generalised advantage estimation.

    Returns:
        `torch.Tensor` of shape (B, K), of the dtype of `info_gain`: advantages, 0 beyond `num_turns`.

    Raises:
        `ValueError`: if shapes do not fit, B is not a multiple of G, a turn count lies outside 1…K, or a name is
        unknown.
    """
    _check(info_gain, outcome, num_turns, num_generations, normalization, scale, beliefs)
    # Statistics in float64: sums then do not depend on padding or on the other groups to float32 precision.
    last = (num_turns - 1)[:, None]
    turn = torch.arange(info_gain.shape[1], device=info_gain.device)
    is_scored = ~outcome.isnan()[:, None]
    is_turn = (turn <= last) & is_scored
    is_gain = (turn < last) & is_scored & info_gain.isfinite()
    gain = info_gain.double().masked_fill(~is_gain, 0.0)
    belief = gain.cumsum(dim=1) - gain if beliefs is None else beliefs.double().nan_to_num(0.0)
    rewards = TurnRewards(
        gain=gain,
        outcome=outcome.double()[:, None].masked_fill(~is_scored, 0.0),
        belief=belief.masked_fill_(~is_turn, 0.0),
        is_gain=is_gain,
        is_turn=is_turn,
        is_scored=is_scored,
        last=last,
        num_generations=num_generations,
        gain_weight=info_gain_weight,
        outcome_weight=outcome_weight,
        gamma=gamma,
        gae_lambda=gae_lambda,
        scale=_SCALES[scale],
        std_floor=std_floor,
    )
    return ESTIMATORS[normalization](rewards).to(info_gain.dtype)


@dataclass
class TurnRewards:
    """
    The rewards of a batch, as the estimators read them; everything is float64 or boolean.

    Attributes:
        gain (`torch.Tensor` of shape (B, K)): gain of each turn, 0 where there is none.
        outcome (`torch.Tensor` of shape (B, 1)): reward of the last turn, 0 where there is none.
        belief (`torch.Tensor` of shape (B, K)): probability of the answer before each turn, 0 where there is no turn.
        is_gain, is_turn (`torch.Tensor` of shape (B, K)): which turns have a gain, and which exist and are scored.
        is_scored (`torch.Tensor` of shape (B, 1)): which rollouts have an outcome.
        last (`torch.Tensor` of shape (B, 1)): index of the last turn.
        num_generations (`int`): group size G.
        gain_weight, outcome_weight (`float`): weights, applied after normalisation.
        gamma, gae_lambda (`float`): discount per turn, and λ of the critic.
        scale (`str`): `"group"`, `"batch"` or `"none"`.
        std_floor (`float`): smallest divisor, in units of the reward.
    """

    gain: torch.Tensor
    outcome: torch.Tensor
    belief: torch.Tensor
    is_gain: torch.Tensor
    is_turn: torch.Tensor
    is_scored: torch.Tensor
    last: torch.Tensor
    num_generations: int
    gain_weight: float
    outcome_weight: float
    gamma: float
    gae_lambda: float
    scale: str
    std_floor: float

    def z_scores(self, values: torch.Tensor, mask: torch.Tensor, *, per_turn: bool = False) -> torch.Tensor:
        """z-scores (B, K) of the masked values within their group (and turn index, with `per_turn`), 0 elsewhere."""
        num_turns = values.shape[1]
        weight = mask.view(-1, self.num_generations, num_turns).to(values.dtype)
        values = values.view(-1, self.num_generations, num_turns) * weight
        pool = (1,) if per_turn else (1, 2)
        mean, std = _mean_and_std(values, weight, pool)
        # Equal values must give exactly 0: their rounded mean can miss them, and rounding noise over its own std is 1.
        distinct = std > 1e-12 * mean.abs()
        if self.scale == "batch":
            _, std = _mean_and_std(values, weight, (0, *pool))
        floor = max(self.std_floor, torch.finfo(values.dtype).tiny)
        divisor = std.clamp(min=floor) if self.scale != "none" else 1.0
        return values.sub_(mean).mul_(weight).mul_(distinct / divisor).view(-1, num_turns)

    def accumulate(self, z_gain: torch.Tensor, z_outcome: torch.Tensor) -> torch.Tensor:
        """Weigh normalised gains (B, K) and outcomes (B, 1), and add up what follows each turn, discounted."""
        z = z_gain.mul_(self.gain_weight).scatter_(1, self.last, self.outcome_weight * z_outcome)
        return _discounted_sum(z, self.gamma).masked_fill_(~self.is_turn, 0.0)


def joint_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    Gains and outcomes share one mean and standard deviation in the group (IGPO, arXiv 2510.14967, Eq. 6).

    $$A_{i,k} = \frac{r_{i,k} - \mu}{\sigma}, \qquad \tilde A_{i,k} = \sum_{j \ge k} \gamma^{j-k} A_{i,j}$$

    with μ and σ over all rewards r of the group's turns. Outcomes are usually far larger than gains and then dominate
    σ. The mean is subtracted once per turn, so a rollout of many turns pays, or earns, it many times: the "turn tax".

    Degenerate cases: a pool of one value or of equal values gives 0.
    """
    pooled = rewards.gain.scatter(1, rewards.last, rewards.outcome)
    z = rewards.z_scores(pooled, rewards.is_gain.scatter(1, rewards.last, rewards.is_scored))
    return rewards.accumulate(z, z.gather(1, rewards.last))


def separate_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    Gains and outcomes each have their own mean and standard deviation in the group (the IGPO authors' training
    script).

    As [`joint_advantages`], with $A_{i,k} = (g_{i,k} - \mu_g) / \sigma_g$ for turns with a gain and
    $A_{i,K_i} = (R_i - \mu_R) / \sigma_R$ for the last turn.

    Degenerate cases: if all outcomes are equal the gains still tell the rollouts apart; a group in which only one
    turn has a gain, or all gains are equal, is GRPO.
    """
    z_outcome = rewards.z_scores(rewards.outcome, rewards.is_scored)
    return rewards.accumulate(rewards.z_scores(rewards.gain, rewards.is_gain), z_outcome)


def per_turn_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    Gains are compared at the same turn index only (A²TGPO, arXiv 2605.06200).

    As [`separate_advantages`], with $\mu_{g,k}$ and $\sigma_{g,k}$ of turn k over the group: first searches are
    compared with first searches.

    Degenerate cases: a turn index that a single rollout reaches gives 0.
    """
    z_outcome = rewards.z_scores(rewards.outcome, rewards.is_scored)
    return rewards.accumulate(rewards.z_scores(rewards.gain, rewards.is_gain, per_turn=True), z_outcome)


def critic_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    Generalised advantage estimation over turns, with a value read off the belief: the belief as critic.

    The value of rollout i is fitted without rollout i, so that no reward is part of its own baseline. A ridge
    regression over the turns of all other rollouts predicts the return-to-go $G_k = \sum_{j \ge k} \gamma^{j-k} r_j$
    from an intercept, one-hot k and the belief $b_k$; what it misses on the other rollouts of the same group, shrunk,
    is added as the level of the question. This gives $V_k$. Then

    $$\delta_k = r_k + \gamma V_{k+1} - V_k, \qquad A_k = \sum_{j \ge k} (\gamma\lambda)^{j-k} \delta_j,$$

    with $V = 0$ after the last turn, divided by the root mean square of $A$ over the batch and not re-centred. With
    a gain weight of 0 the only reward is the outcome: the objective is GRPO's, and the belief only tells in which turn
    the outcome was decided. For γ = 1 and gains in probability the target is $R + w (b_S - b_k)$ with S the last
    turn.

    Degenerate cases: if all returns are equal, every advantage is exactly 0; so is that of a rollout without others.
    A rollout without an outcome is left out of the fit; with `scale="none"` nothing is divided.
    """
    reward = (rewards.gain_weight * rewards.gain).scatter_(1, rewards.last, rewards.outcome_weight * rewards.outcome)
    is_turn = rewards.is_turn & (rewards.is_scored.sum() > 1)
    reward = reward.masked_fill_(~is_turn, 0.0)
    value = _leave_one_out_value(
        _discounted_sum(reward, rewards.gamma), rewards.belief, is_turn, rewards.num_generations
    )
    delta = reward.sub_(value)  # 0 after the last turn, as the value is
    delta[:, :-1].add_(value[:, 1:], alpha=rewards.gamma)
    advantages = _discounted_sum(delta, rewards.gamma * rewards.gae_lambda).masked_fill_(~is_turn, 0.0)
    if rewards.scale != "none":
        num_rows = is_turn.sum().clamp(min=1).to(advantages.dtype)
        root_mean_square = torch.linalg.vector_norm(advantages) / num_rows.sqrt()
        advantages.div_(root_mean_square.clamp(min=max(rewards.std_floor, torch.finfo(advantages.dtype).tiny)))
    return advantages


ESTIMATORS: dict[str, Callable[[TurnRewards], torch.Tensor]] = {
    "joint": joint_advantages,
    "separate": separate_advantages,
    "per_turn": per_turn_advantages,
    "critic": critic_advantages,
}
NORMALIZATIONS = tuple(ESTIMATORS)


def _leave_one_out_value(
    returns: torch.Tensor, belief: torch.Tensor, is_turn: torch.Tensor, num_generations: int
) -> torch.Tensor:
    """
    Value (B, K) of every turn, each rollout's from a ridge regression on all rollouts but itself.

    The features are an intercept c, the standardised belief (slope s) and one-hot k (offset t_k). The one-hots have a
    diagonal block of the normal equations, so eliminating them leaves two unknowns per rollout, and leaving a rollout
    out changes the sums over the batch only at its own turns: matrix products with (K, 1) vectors give all of them.
    """
    weight = is_turn.to(returns.dtype)
    length = weight.sum(dim=1)
    num_rows = length.sum().clamp(min=1)
    # An offset common to all returns belongs to the intercept. Taking it off first makes equal returns exactly 0.
    offset = returns.flatten()[weight.argmax()] if len(weight) else 0.0
    x, y = (belief - belief.sum() / num_rows).mul_(weight), (returns - offset).mul_(weight)
    xx, xy = x * x, x * y
    # Standardised, the slope would have the penalty _RIDGE; this is the same for the belief as it stands.
    penalty = _RIDGE * (xx.sum() / num_rows).clamp(min=1e-12)

    # Sums per turn index over all rollouts, and the inverse of (their number + ridge): for turns that a rollout does
    # not have, and for its own ones, which are left out.
    n_k, x_k, y_k = (values.sum(dim=0) for values in (weight, x, y))
    without, own = 1 / (n_k + _RIDGE), 1 / (n_k - 1 + _RIDGE)
    change = own - without
    cc = _RIDGE * (n_k @ without + weight @ ((n_k - 1) * own - n_k * without))
    cx = _RIDGE * (x_k @ without + weight @ (x_k * change) - x @ own)
    cy = _RIDGE * (y_k @ without + weight @ (y_k * change) - y @ own)
    of_x = x_k.square() @ without + weight @ (x_k.square() * change) - 2 * (x @ (x_k * own)) + xx @ own
    of_y = (x_k * y_k) @ without + weight @ (x_k * y_k * change) - x @ (y_k * own) - y @ (x_k * own) + xy @ own
    xx, xy = xx.sum() - xx.sum(dim=1) + penalty - of_x, xy.sum() - xy.sum(dim=1) - of_y
    determinant = (cc * xx - cx * cx).clamp(min=torch.finfo(y.dtype).tiny)
    c, s = (xx * cy - cx * xy) / determinant, (cc * xy - cx * cy) / determinant
    line = (s[:, None] * x).add_(c[:, None]).mul_(weight)
    t = torch.addcmul(y_k, s[:, None], x_k, value=-1).sub_(y).addcmul_(c[:, None], n_k, value=-1)
    t.add_(line).mul_(torch.addcmul(without, weight, change))

    # Level of the question: what fit i misses on rollout j of its group, averaged over j's turns, summed and shrunk.
    grouped = (-1, num_generations, t.shape[1])
    divisor = length.clamp(min=1)
    y_mean, x_mean = ((values.sum(dim=1) / divisor).view(-1, 1, num_generations) for values in (y, x))
    t_mean = t.view(grouped) @ weight.view(grouped).mT / divisor.view(-1, 1, num_generations)
    missed = y_mean - c.view(-1, num_generations, 1) - s.view(-1, num_generations, 1) * x_mean - t_mean
    is_other = (length > 0).view(-1, 1, num_generations) & ~torch.eye(num_generations, dtype=torch.bool).to(is_turn)
    level = (missed * is_other).sum(dim=2) / (is_other.sum(dim=2) + _RIDGE)
    return line.add_(t).add_(level.view(-1, 1) + offset).mul_(weight)


def _mean_and_std(
    values: torch.Tensor, weight: torch.Tensor, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Population statistics over `dims` where the 0/1 weight is 1; `values` are 0 elsewhere."""
    count = weight.sum(dim=dims, keepdim=True).clamp(min=1)
    mean = values.sum(dim=dims, keepdim=True) / count
    centred = (values - mean).mul_(weight)
    return mean, (centred.square_().sum(dim=dims, keepdim=True) / count).sqrt()


def _discounted_sum(values: torch.Tensor, gamma: float) -> torch.Tensor:
    """Σ_{j ≥ k} γ^(j-k) values[:, j] for (B, K) values; one vector operation per turn."""
    by_turn = values.T.clone(memory_format=torch.contiguous_format)
    for k in range(len(by_turn) - 2, -1, -1):
        by_turn[k].add_(by_turn[k + 1], alpha=gamma)
    return by_turn.T.contiguous()


def _check(
    info_gain: torch.Tensor,
    outcome: torch.Tensor,
    num_turns: torch.Tensor,
    num_generations: int,
    normalization: str,
    scale: bool | str,
    beliefs: torch.Tensor | None,
) -> None:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"`normalization` must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}.")
    if scale not in _SCALES:
        raise ValueError(f"`scale` must be True, False, 'group', 'batch' or 'none', got {scale!r}.")
    if info_gain.dim() != 2 or outcome.shape != info_gain.shape[:1] or num_turns.shape != outcome.shape:
        raise ValueError(
            f"`info_gain` must be (B, K), `outcome` and `num_turns` (B,), got {tuple(info_gain.shape)}, "
            f"{tuple(outcome.shape)} and {tuple(num_turns.shape)}."
        )
    if beliefs is not None and beliefs.shape != info_gain.shape:
        raise ValueError(
            f"`beliefs` must have the shape of `info_gain`, got {tuple(beliefs.shape)} and {tuple(info_gain.shape)}."
        )
    if num_generations < 1 or len(outcome) % num_generations != 0:
        raise ValueError(
            f"The number of rollouts must be a multiple of `num_generations`, got {len(outcome)} rollouts in groups "
            f"of {num_generations}. Pass the rollouts of whole groups, gathered from all processes."
        )
    if len(num_turns) and not (1 <= int(num_turns.min()) and int(num_turns.max()) <= info_gain.shape[1]):
        raise ValueError(
            f"`num_turns` must lie between 1 and K = {info_gain.shape[1]}, got values from {int(num_turns.min())} to "
            f"{int(num_turns.max())}."
        )
