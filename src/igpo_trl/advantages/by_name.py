"""Advantages by the name of their estimator, and the price of a turn."""

from collections.abc import Callable
from typing import Literal

import torch

from .critic import critic_advantages
from .estimators import joint_advantages, per_turn_advantages, returns_advantages, separate_advantages
from .turn_rewards import TurnRewards

Normalization = Literal["joint", "separate", "per_turn", "returns", "critic"]
_SCALES: dict[bool | str, str] = {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}

ESTIMATORS: dict[str, Callable[[TurnRewards], torch.Tensor]] = {
    "joint": joint_advantages,
    "separate": separate_advantages,
    "per_turn": per_turn_advantages,
    "returns": returns_advantages,
    "critic": critic_advantages,
}
NORMALIZATIONS = tuple(ESTIMATORS)


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
    gae_lambda: float = 0.9,
) -> torch.Tensor:
    r"""
    Advantage of every turn, from its information gain and the outcome of its rollout (IGPO, arXiv 2510.14967).

    The estimators are [`joint_advantages`], [`separate_advantages`], [`per_turn_advantages`],
    [`returns_advantages`] and [`critic_advantages`]; their docstrings have the formulas.

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
            `"per_turn"`, `"returns"` or `"critic"`.
        gamma (`float`, *optional*, defaults to `1.0`): Discount per turn (not per token).
        scale (`bool` or `str`, *optional*, defaults to `True`): What to divide by: `True` or `"group"` the pool's
            standard deviation, `"batch"` that of the whole batch, `False` or `"none"` nothing. `returns` and
            `critic` divide by the root mean square over the batch unless this is `"none"`.
        info_gain_weight (`float`, *optional*, defaults to `1.0`): Weight of the gains, applied after normalisation
            (before it, a z-score would undo it).
        outcome_weight (`float`, *optional*, defaults to `1.0`): Weight of the outcome, likewise.
        std_floor (`float`, *optional*, defaults to `1e-2`): Smallest standard deviation divided by, in units of the
            reward, so that noise is not blown up to unit scale.
        beliefs (`torch.Tensor` of shape (B, K), *optional*): Probability of the answer before turn k; read by the
            critic only. Defaults to the running sum of `info_gain`, which is the belief relative to the prompt's.
        gae_lambda (`float`, *optional*, defaults to `0.9`): λ of the critic's generalised advantage estimation.

    Returns:
        `torch.Tensor` of shape (B, K), of the dtype of `info_gain`: advantages, 0 beyond `num_turns`.

    Raises:
        `ValueError`: if shapes do not fit, B is not a multiple of G, a turn count lies outside 1…K, or a name is
        unknown.
    """
    _check(info_gain, outcome, num_turns, num_generations, normalization, scale, beliefs)
    rewards = TurnRewards.of(
        info_gain,
        outcome,
        num_turns,
        beliefs,
        num_generations=num_generations,
        gain_weight=info_gain_weight,
        outcome_weight=outcome_weight,
        gamma=gamma,
        gae_lambda=gae_lambda,
        scale=_SCALES[scale],
        std_floor=std_floor,
    )
    return ESTIMATORS[normalization](rewards).to(info_gain.dtype)


def turn_price(
    info_gain: torch.Tensor,
    outcome: torch.Tensor,
    num_turns: torch.Tensor,
    num_generations: int,
    *,
    normalization: Normalization = "separate",
    scale: bool | str = True,
    info_gain_weight: float = 1.0,
    std_floor: float = 1e-2,
) -> float:
    r"""
    What a rollout pays for a further turn that changes nothing, in units of the advantage; negative if it earns.

    $w \mu / \sigma$ of the pool that the gain of the turn belongs to: the z-score of a gain of 0 with its sign
    changed, averaged over the turns of each rollout that have a gain, then over rollouts. Estimators that add up first
    charge nothing: `returns` and `critic` give 0. Arguments as in [`turn_advantages`].
    """
    _check(info_gain, outcome, num_turns, num_generations, normalization, scale, None)
    if normalization not in ("joint", "separate", "per_turn"):
        return 0.0
    options = {"num_generations": num_generations, "gain_weight": info_gain_weight, "outcome_weight": 1.0}
    options |= {"gamma": 1.0, "gae_lambda": 1.0, "scale": _SCALES[scale], "std_floor": std_floor}
    rewards = TurnRewards.of(info_gain, outcome, num_turns, None, **options)
    nothing = torch.zeros_like(rewards.gain)
    if normalization == "joint":
        z = rewards.z_scores(*rewards.pooled(), of=nothing)
    else:
        z = rewards.z_scores(rewards.gain, rewards.is_gain, of=nothing, per_turn=normalization == "per_turn")
    count = rewards.is_gain.sum(dim=1)
    by_rollout = (z * rewards.is_gain).sum(dim=1) / count.clamp(min=1)
    return -info_gain_weight * float(by_rollout.sum() / (count > 0).sum().clamp(min=1))


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
