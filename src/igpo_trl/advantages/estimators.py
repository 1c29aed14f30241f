"""Estimators that compare a group with itself: a mean first, and then what follows; or what follows first."""

import torch

from .turn_rewards import TurnRewards


def joint_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    Gains and outcomes share one mean and standard deviation in the group (IGPO, arXiv 2510.14967, Eq. 6).

    $$A_{i,k} = \frac{r_{i,k} - \mu}{\sigma}, \qquad \tilde A_{i,k} = \sum_{j \ge k} \gamma^{j-k} A_{i,j}$$

    with μ and σ over all rewards r of the group's turns. Outcomes are usually far larger than gains and then dominate
    σ. The mean is subtracted once per turn, so a rollout of many turns pays, or earns, it many times: the "turn tax".

    Degenerate cases: a pool of one value or of equal values gives 0.
    """
    z = rewards.z_scores(*rewards.pooled())
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


def returns_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    What follows a turn, less what follows the same turn in the other rollouts of the group that have it.

    $$G_{i,k} = \sum_{j \ge k} \gamma^{j-k} r_{i,j}, \qquad A_{i,k} = G_{i,k} - \frac{1}{n} \sum_{i' \ne i} G_{i',k},$$

    with r the weighted gains and outcomes and n the number of those rollouts, divided by the root mean square of A
    over the batch and not re-centred. The baseline depends neither on the rollout's own rewards nor on how many turns
    it goes on to take, so the gradient is that of the rewards (leave-one-out REINFORCE, one baseline per turn index).

    Degenerate cases: a turn that no other rollout of the group has is compared with their last turns, whose return is
    the outcome; a rollout without others gives 0, as do equal outcomes with a gain weight of 0.
    """
    weight, returns = rewards.turn_weight, rewards.following_(rewards.weighted(), rewards.gamma)
    # An offset common to all returns is in every baseline. Taking it off first makes equal returns exactly 0.
    returns.sub_(rewards.first_return(returns)).mul_(weight)
    grouped = (-1, rewards.num_generations, weight.shape[1])
    returns, weight = returns.view(grouped), weight.view(grouped)
    outcome, is_scored = returns.gather(2, rewards.last.view(*returns.shape[:2], 1)), weight[:, :, :1]
    others = is_scored.sum(dim=1, keepdim=True) - is_scored
    of_outcomes = (outcome.sum(dim=1, keepdim=True) - outcome) / others.clamp(min=1)
    reached = weight.sum(dim=1, keepdim=True) - weight
    baseline = returns.sum(dim=1, keepdim=True) - returns
    baseline.addcmul_((reached == 0).to(baseline.dtype), of_outcomes).div_(reached.clamp_(min=1))
    advantages = returns.sub_(baseline).mul_(weight).mul_(others > 0)
    return rewards.over_root_mean_square(advantages.view_as(rewards.gain))
