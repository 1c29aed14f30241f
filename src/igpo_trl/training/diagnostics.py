"""What a generation batch says about the method: metrics of beliefs, gains and credit. Axes: N rollouts, K turns."""

import torch


def belief_metrics(gains: torch.Tensor, beliefs: torch.Tensor, num_turns: torch.Tensor) -> dict[str, float]:
    """
    Metrics of gains and beliefs.

    Args:
        gains (`torch.Tensor` of any shape): all gains.
        beliefs (`torch.Tensor` of shape (N, K)): probability of the answer before each turn, NaN where it is unknown.
        num_turns (`torch.Tensor` of shape (N,)): turns of each rollout.

    Returns:
        `dict[str, float]`: by name; only those for which there is something.
    """
    metrics = {}
    if len(gains):
        metrics["info_gain/mean"] = gains.mean().item()
        metrics["info_gain/std"] = gains.std(correction=0).item()
        metrics["info_gain/positive"] = (gains > 0).float().mean().item()
    if not beliefs[:, 0].isnan().all():
        last = beliefs.gather(1, (num_turns - 1)[:, None])
        metrics["belief/prompt"] = beliefs[:, 0].nanmean().item()
        metrics["belief/final"] = last.nanmean().item()
    return metrics


def credit_metrics(
    outcome: torch.Tensor, advantages: torch.Tensor, num_turns: torch.Tensor, num_generations: int
) -> dict[str, float]:
    """
    Metrics of what the turns are trained with.

    Args:
        outcome (`torch.Tensor` of shape (N,)): NaN where no reward function applies.
        advantages (`torch.Tensor` of shape (N, K)): of turns, 0 beyond the last.
        num_turns (`torch.Tensor` of shape (N,)): turns of each rollout.
        num_generations (`int`): group size.

    Returns:
        `dict[str, float]`: by name.
    """
    groups = outcome.view(-1, num_generations)
    differs = groups.nan_to_num(-torch.inf).amax(dim=1) > groups.nan_to_num(torch.inf).amin(dim=1)
    moves = (advantages != 0).view(len(groups), -1).any(dim=1)
    is_turn = torch.arange(advantages.shape[1]) < num_turns[:, None]
    return {
        "collapse/outcome": 1 - differs.float().mean().item(),
        "collapse/advantage": 1 - moves.float().mean().item(),
        "advantages/abs_mean": advantages[is_turn].abs().mean().item(),
    }
