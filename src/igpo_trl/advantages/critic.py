"""The belief as critic: a value fitted from the belief, and generalised advantages over turns."""

import torch

from .turn_rewards import TurnRewards

# Ridge of the fit in rows of the batch, and of its group levels in rollouts: little data moves little.
_RIDGE = 4.0


def critic_advantages(rewards: TurnRewards) -> torch.Tensor:
    r"""
    Generalised advantage estimation over turns, with a value read off the belief: the belief as critic.

    The value of rollout i is fitted without rollout i, so that no reward is part of its own baseline. A ridge
    regression over the turns of all other rollouts predicts the return-to-go $G_k = \sum_{j \ge k} \gamma^{j-k} r_j$
    from an intercept, one-hot k, the belief $b_k$ and its square; what it misses on the other rollouts of the same
    group, shrunk, is added as the level of the question. This gives $V_k$. Then

    $$\delta_k = r_k + \gamma V_{k+1} - V_k, \qquad A_k = \sum_{j \ge k} (\gamma\lambda)^{j-k} \delta_j,$$

    with $V = 0$ after the last turn, divided by the root mean square of $A$ over the batch and not re-centred. With
    γ = 1 and gains in probability the target is $R + w (b_S - b_k)$ with S the last turn. If beliefs are calibrated,
    $b_S$ is the expected R: the gradient is that of R times 1 + w, with less noise. With w = 0 the only reward is the
    outcome, and the belief only tells in which turn it was decided.

    Degenerate cases: if all returns are equal, every advantage is exactly 0; so is that of a rollout without others.
    A rollout without an outcome is left out of the fit; with `scale="none"` nothing is divided.
    """
    rewards.turn_weight.mul_(rewards.is_scored.sum() > 1)  # who has no others is compared with nothing
    delta = rewards.weighted().mul_(rewards.turn_weight)
    value = _leave_one_out_value(rewards, rewards.following_(delta.clone(), rewards.gamma))
    delta.sub_(value)  # 0 after the last turn, as the value is
    delta[:, :-1].add_(value[:, 1:], alpha=rewards.gamma)
    return rewards.over_root_mean_square(rewards.following_(delta, rewards.gamma * rewards.gae_lambda))


def _leave_one_out_value(rewards: TurnRewards, returns: torch.Tensor) -> torch.Tensor:
    """
    Value (B, K) of every turn, each rollout's from a ridge regression on all rollouts but itself.

    The features are an intercept, the standardised belief x, its standardised square z, and one-hot k. The one-hots
    have a diagonal block of the normal equations, so eliminating them leaves three unknowns per rollout; and leaving a
    rollout out changes the sums over the batch only at its own turns, so matrix products with a few vectors of length
    K give all equations.
    """
    weight, num_generations = rewards.turn_weight, rewards.num_generations
    length = weight.sum(dim=1)
    num_rows = length.sum().clamp(min=1)

    def standardise_(values: torch.Tensor) -> torch.Tensor:
        values.sub_(values.sum() / num_rows).mul_(weight)
        return values.div_((torch.linalg.vector_norm(values) / num_rows.sqrt()).clamp(min=1e-6))

    # An offset common to all returns belongs to the intercept. Taking it off first makes equal returns exactly 0.
    offset = rewards.first_return(returns)
    x, y = standardise_(rewards.belief), returns.sub_(offset).mul_(weight)
    columns = (weight, x, standardise_(x * x), y)

    # Sums per turn index over all rollouts, and the inverse of (their number + ridge): for turns that a rollout does
    # not have, and for its own ones, which are left out.
    totals = torch.stack([column.sum(dim=0) for column in columns])
    without, own = 1 / (totals[0] + _RIDGE), 1 / (totals[0] - 1 + _RIDGE)
    change = own - without
    pairs = ((0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3))
    both = torch.stack([totals[a] * totals[b] for a, b in pairs])
    eliminated = torch.addmm(both @ without, weight, (both * change).T)  # (B, pairs)
    sums = torch.stack([column @ torch.stack([*(totals * own), own, torch.ones_like(own)]).T for column in columns])
    normal = returns.new_zeros(len(returns), 3, 4)  # the equations of each rollout, with y as the last column
    buffer = torch.empty_like(y)
    for pair, (a, b) in enumerate(pairs):
        of_product = sums[b, :, 4:]
        if a > 0:
            of_product = torch.mul(columns[a], columns[b], out=buffer) @ torch.stack([own, torch.ones_like(own)]).T
        without_own = eliminated[:, pair] - sums[a, :, b] - sums[b, :, a] + of_product[:, 0]
        normal[:, a, b] = of_product[:, 1].sum() - of_product[:, 1] - without_own
    normal[:, 1, 0], normal[:, 2, 0], normal[:, 2, 1] = normal[:, 0, 1], normal[:, 0, 2], normal[:, 1, 2]
    normal.diagonal(dim1=1, dim2=2).add_(normal.new_tensor([1e-30, _RIDGE, _RIDGE]))  # the first: if nobody is left
    coefficients = torch.linalg.solve(normal[:, :, :3], normal[:, :, 3])  # (B, 3)

    fit = torch.mul(weight, coefficients[:, :1], out=buffer)
    for a in (1, 2):
        fit.addcmul_(columns[a], coefficients[:, a : a + 1])
    one_hots = torch.addmm(totals[3], coefficients, totals[:3], alpha=-1).sub_(y).add_(fit)
    means = sums[:, :, 5].T / length.clamp(min=1)[:, None]
    one_hots.mul_(torch.mul(weight, change, out=y).add_(without))

    # Level of the question: what fit i misses on rollout j of its group, averaged over j's turns, summed and shrunk.
    def grouped(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, num_generations, values.shape[-1])

    by_one_hots = grouped(one_hots) @ grouped(weight).mT / length.clamp(min=1).view(-1, 1, num_generations)
    missed = grouped(means[:, 3:]).mT - grouped(coefficients) @ grouped(means[:, :3]).mT - by_one_hots
    is_other = (length > 0).view(-1, 1, num_generations) & ~torch.eye(num_generations, dtype=torch.bool).to(
        weight.device
    )
    level = (missed * is_other).sum(dim=2) / (is_other.sum(dim=2) + _RIDGE)
    return fit.add_(one_hots).add_(level.view(-1, 1) + offset).mul_(weight)
