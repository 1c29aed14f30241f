"""Turn-level advantages: normalisation in the group, discounting over turns, and the belief critic.

Pure functions on tensors. Axes: B rollouts in consecutive groups of G, K turns. Rollout i has `num_turns[i]` = K_i
turns; turn k < K_i - 1 is rewarded with its information gain, the last one with the outcome.
"""

from typing import Literal

import torch

Normalization = Literal["joint", "separate", "per_turn", "critic"]
NORMALIZATIONS: tuple[str, ...] = ("joint", "separate", "per_turn", "critic")
_SCALES: dict[bool | str, str] = {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}

# Ridge of the critic's fit, per row: one on the features, a smaller one on the per-turn intercepts.
_RIDGE, _RIDGE_INTERCEPT = 1e-4, 1e-5


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

    In the three normalising modes rewards become z-scores within the group (population statistics), are weighted, and
    are accumulated over the turns that follow:

    $$\tilde A_{i,k} = \sum_{j \ge k} \gamma^{j-k} A_{i,j}$$

    - `"joint"`: gains and outcomes share one mean and std (the paper, Eq. 6).
    - `"separate"`: gains and outcomes each have their own (the authors' training script).
    - `"per_turn"`: gains are compared at the same turn index only (A²TGPO, arXiv 2605.06200).

    `"critic"` does not normalise rewards. It fits a value of each turn from the belief before it and returns
    generalised advantages, see [`critic_advantages`].

    Degenerate cases: a pool of one value or of equal values gives 0. A rollout whose outcome is NaN (no reward
    function applied to it) leaves every pool and has advantage 0, as in TRL. A gain that is not finite counts as no
    reward of that turn; the rollout's other turns keep theirs.

    Args:
        info_gain (`torch.Tensor` of shape (B, K)):
            Gain of each turn (difference of probabilities, or of log-probabilities in nats). Read for
            `k < num_turns - 1` only.
        outcome (`torch.Tensor` of shape (B,)):
            Outcome reward of each rollout.
        num_turns (`torch.Tensor` of shape (B,)):
            Number of turns of each rollout, between 1 and K.
        num_generations (`int`):
            Group size G; rows `iG … (i+1)G - 1` answer the same question.
        normalization (`str`, *optional*, defaults to `"separate"`):
            One of `"joint"`, `"separate"`, `"per_turn"`, `"critic"`.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per turn (not per token).
        scale (`bool` or `str`, *optional*, defaults to `True`):
            What to divide by: `True` or `"group"` the pool's std, `"batch"` the std over the whole batch, `False` or
            `"none"` nothing. The critic divides by the root mean square over the batch unless this is `"none"`.
        info_gain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the gains, applied after normalisation (before it, a z-score would undo it).
        outcome_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the outcome, likewise.
        std_floor (`float`, *optional*, defaults to `1e-2`):
            Smallest std divided by, in units of the reward, so that noise is not blown up to unit scale.
        beliefs (`torch.Tensor` of shape (B, K), *optional*):
            Probability of the answer before turn k; read by the critic only. Defaults to the running sum of
            `info_gain`, which is the belief relative to the prompt's.
        gae_lambda (`float`, *optional*, defaults to `0.8`):
            λ of the critic's generalised advantage estimation.

    Returns:
        `torch.Tensor` of shape (B, K), of the dtype of `info_gain`: advantages, 0 beyond `num_turns`.

    Raises:
        `ValueError`: if shapes do not fit, B is not a multiple of G, a turn count lies outside 1…K, or a name is
        unknown.
    """
    _check(info_gain, outcome, num_turns, num_generations, normalization, scale, beliefs)
    scale = _SCALES[scale]
    # Statistics in float64: sums then do not depend on padding or on the other groups to float32 precision.
    last = (num_turns - 1)[:, None]
    turn = torch.arange(info_gain.shape[1], device=info_gain.device)
    scored = ~outcome.isnan()[:, None]
    is_turn = (turn <= last) & scored
    is_gain = (turn < last) & scored & info_gain.isfinite()
    gain = info_gain.double().masked_fill(~is_gain, 0.0)
    final = outcome.double()[:, None].masked_fill(~scored, 0.0)  # (B, 1), the reward of the last turn

    if normalization == "critic":
        belief = gain.cumsum(dim=1) - gain if beliefs is None else beliefs.double().nan_to_num(0.0)
        advantages = critic_advantages(
            (info_gain_weight * gain).scatter_(1, last, outcome_weight * final),
            belief.masked_fill_(~is_turn, 0.0),
            (outcome_weight * final + info_gain_weight * belief.gather(1, last))[:, 0],
            is_turn,
            num_generations,
            gamma=gamma,
            gae_lambda=gae_lambda,
            scale=scale != "none",
            scale_floor=std_floor,
        )
    else:
        if normalization == "joint":
            z = _standardize(
                gain.scatter_(1, last, final), is_gain.scatter(1, last, scored), num_generations, scale, std_floor
            )
            z_final = z.gather(1, last)
        else:
            z = _standardize(gain, is_gain, num_generations, scale, std_floor, per_turn=normalization == "per_turn")
            z_final = _standardize(final, scored, num_generations, scale, std_floor)
        z = z.mul_(info_gain_weight).scatter_(1, last, outcome_weight * z_final)
        advantages = _discounted_sum(z, gamma).masked_fill_(~is_turn, 0.0)
    return advantages.to(info_gain.dtype)


def critic_advantages(
    rewards: torch.Tensor,
    beliefs: torch.Tensor,
    reached: torch.Tensor,
    is_turn: torch.Tensor,
    num_generations: int,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.8,
    scale: bool = True,
    scale_floor: float = 1e-2,
) -> torch.Tensor:
    r"""
    Generalised advantage estimation over turns, with a value read off the belief: the belief as critic.

    A ridge regression over all turns of the batch predicts the return-to-go $G_k = \sum_{j \ge k} \gamma^{j-k} r_j$
    from [one-hot k, $b_k$, $b_k^2$, leave-one-out group mean of what rollouts reached], which gives $V_k$. Then

    $$\delta_k = r_k + \gamma V_{k+1} - V_k, \qquad A_k = \sum_{j \ge k} (\gamma\lambda)^{j-k} \delta_j,$$

    with $V = 0$ behind the last turn, divided by the root mean square of $A$ over the batch and not re-centred. With
    a gain weight of 0 the only reward is the outcome: the objective is GRPO's, and the belief only tells which turn
    the outcome was decided in. For γ = 1 and gains in probability the target is $R + w (b_S - b_k)$.

    Args:
        rewards (`torch.Tensor` of shape (B, K)): weighted reward of each turn, 0 where there is none.
        beliefs (`torch.Tensor` of shape (B, K)): probability of the answer before turn k.
        reached (`torch.Tensor` of shape (B,)): $R + w b_S$, outcome and belief before the last turn S, weighted.
        is_turn (`torch.Tensor` of shape (B, K)): which turns exist and are scored.
        num_generations (`int`): group size G.
        gamma (`float`): discount per turn.
        gae_lambda (`float`): λ.
        scale (`bool`): whether to divide by the root mean square over the batch.
        scale_floor (`float`): smallest root mean square divided by, in units of the reward.

    Returns:
        `torch.Tensor` of shape (B, K), 0 where `is_turn` is false.
    """
    scored = is_turn.any(dim=1)
    grouped = reached.masked_fill(~scored, 0.0).view(-1, num_generations)
    others = scored.view(-1, num_generations).sum(dim=1, keepdim=True) - scored.view(-1, num_generations).long()
    leave_one_out = ((grouped.sum(dim=1, keepdim=True) - grouped) / others.clamp(min=1)).masked_fill(others < 1, 0.0)
    mask = is_turn.to(beliefs.dtype)
    beliefs = beliefs * mask
    features = [beliefs, beliefs.square(), mask * leave_one_out.reshape(-1, 1)]  # F times (B, K)
    target = _discounted_sum(rewards, gamma).mul_(mask)

    # Normal equations in blocks: the one-hot columns are never written out (their own block is diagonal).
    num_features, num_turns = len(features), mask.shape[1]
    num_rows = mask.sum().clamp(min=1)
    normal = beliefs.new_zeros(num_turns + num_features, num_turns + num_features)
    normal[:num_turns, :num_turns] = torch.diag(mask.sum(dim=0) + _RIDGE_INTERCEPT * num_rows)
    normal[num_turns:, :num_turns] = torch.stack([feature.sum(dim=0) for feature in features])
    normal[:num_turns, num_turns:] = normal[num_turns:, :num_turns].T
    flat = [feature.view(-1) for feature in features]
    products = torch.stack([torch.stack([one @ other for other in flat]) for one in flat])
    normal[num_turns:, num_turns:] = products + _RIDGE * num_rows * torch.eye(num_features).to(products)
    moments = torch.stack([one @ target.view(-1) for one in flat])
    solution = torch.linalg.solve(normal, torch.cat([target.sum(dim=0), moments]))
    value = mask * solution[:num_turns]
    for feature, coefficient in zip(features, solution[num_turns:].tolist(), strict=True):
        value.add_(feature, alpha=coefficient)

    delta = rewards.masked_fill(~is_turn, 0.0).sub_(value)  # 0 behind the last turn, as the value is
    delta[:, :-1].add_(value[:, 1:], alpha=gamma)
    advantages = _discounted_sum(delta, gamma * gae_lambda)
    if scale:
        root_mean_square = torch.linalg.vector_norm(advantages) / num_rows.sqrt()
        advantages.div_(root_mean_square.clamp(min=max(scale_floor, torch.finfo(advantages.dtype).tiny)))
    return advantages


def _standardize(
    values: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    scale: str,
    std_floor: float,
    per_turn: bool = False,
) -> torch.Tensor:
    """z-scores (B, K) of the masked values within their group (and turn index, with `per_turn`), 0 elsewhere."""
    num_turns = values.shape[1]
    weight = mask.view(-1, num_generations, num_turns).to(values.dtype)
    values = values.view(-1, num_generations, num_turns) * weight
    pool = (1,) if per_turn else (1, 2)
    mean, std = _mean_and_std(values, weight, pool)
    # Equal values must give exactly 0: their rounded mean can miss them, and rounding noise over its own std is 1.
    distinct = std > 1e-12 * mean.abs()
    if scale == "batch":
        _, std = _mean_and_std(values, weight, (0, *pool))
    divisor = std.clamp(min=max(std_floor, torch.finfo(values.dtype).tiny)) if scale != "none" else 1.0
    return values.sub_(mean).mul_(weight).mul_(distinct / divisor).view(-1, num_turns)


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
