"""Turns of a rollout, found from the sampled-token mask alone.

A *turn* is one maximal run of tokens sampled from the policy; the tokens between two turns are an *observation*
(rendered tool results and the next generation prompt). Text is never searched: a tool may return anything, role
markers and end-of-turn strings included.

Axes: B rollouts, T completion tokens, K turns.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch

# What the gain of a turn is the rise of, as a function of the log-belief. Above exp(-0.1) = 0.9 a belief is certain.
_CERTAIN = 0.1
GAINS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "prob_diff": torch.exp,
    "log_prob_diff": lambda log_belief: log_belief,
    "log_gap": lambda log_belief: -(_CERTAIN - log_belief).log(),
}

#: A gain that is no rise of a belief: 1 for the turn whose observation is the first to contain an answer (TSPO, arXiv
#: 2601.22776).
FIRST_SEEN = "first_seen"


def turn_spans(sampled_mask: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Find the turns of every rollout.

    A completion that ends in an observation (the length limit left no room to sample after it) has one last, empty
    turn after that observation: the turn before it was executed and keeps its information gain, and the missing
    answer is charged to the empty one.

    Args:
        sampled_mask (`torch.Tensor` of shape (B, T)): 1 on tokens sampled from the policy, 0 on observations (TRL's
            `tool_mask`). Read up to `lengths` only.
        lengths (`torch.Tensor` of shape (B,)): Number of completion tokens of each rollout; the rest is padding.

    Returns:
        `tuple` of `torch.Tensor`:
            - `turn_index` (B, T), int64: the turn that a sampled token belongs to, -1 on observations and padding.
            - `starts` (B, K), int64: the completion position at which turn k begins, `lengths` beyond the last turn.
              The policy's context before turn k is the prompt and the first `starts[:, k]` completion tokens.
            - `num_turns` (B,), int64, at least 1: a rollout with no tokens counts as one empty turn.

    Raises:
        `ValueError`: if the shapes do not fit.
    """
    if sampled_mask.dim() != 2 or lengths.shape != sampled_mask.shape[:1]:
        raise ValueError(
            f"`sampled_mask` must be (B, T) and `lengths` (B,), got {tuple(sampled_mask.shape)} and "
            f"{tuple(lengths.shape)}."
        )
    num_rollouts, num_tokens = sampled_mask.shape
    position = torch.arange(num_tokens, device=sampled_mask.device)
    valid = position < lengths[:, None]
    sampled = sampled_mask.bool() & valid
    begins = sampled.clone()
    begins[:, 1:] &= ~sampled[:, :-1]

    ordinal = begins.long().cumsum(dim=1) - 1
    turn_index = ordinal.masked_fill(~sampled, -1)
    ends_in_observation = (valid & ~sampled & (position == lengths[:, None] - 1)).any(dim=1)
    num_turns = (begins.sum(dim=1) + ends_in_observation).clamp(min=1)

    max_turns = int(num_turns.max()) if num_rollouts else 1
    starts = lengths.long()[:, None].repeat(1, max_turns)
    rollout, token = begins.nonzero(as_tuple=True)
    starts[rollout, ordinal[rollout, token]] = token
    return turn_index, starts, num_turns


def gain_spans(
    num_turns: int,
    tools_called: Sequence[Collection[str]] = (),
    *,
    every: int = 1,
    tools: Collection[str] | None = None,
) -> list[tuple[int, int]]:
    """
    The spans of turns over which an information gain is measured, in one rollout.

    Span (a, b) covers turns a … b - 1: its gain is the belief before turn b minus that before turn a, and it is the
    reward of turn b - 1. The last turn has none. With γ = 1 every turn of a span gets the same credit, because that
    reward follows each of them.

    Args:
        num_turns (`int`): number of turns of the rollout.
        tools_called (list of collection of `str`, *optional*): names of the tools that each turn called.
        every (`int`, *optional*, defaults to `1`): turns per span; the last span may be shorter.
        tools (collection of `str`, *optional*): drop spans in which none of these was called.

    Returns:
        list of `tuple[int, int]`: the spans in order; empty for a rollout of one turn.
    """
    ends = [0, *range(every, num_turns - 1, every), num_turns - 1]
    spans = [(a, b) for a, b in pairwise(ends) if a < b]
    if tools is None:
        return spans
    return [(a, b) for a, b in spans if any(name in tools for names in tools_called[a:b] for name in names)]


def information_gain(
    log_beliefs: torch.Tensor,
    info_gain: str = "prob_diff",
    *,
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    clip: float | None = None,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Information gain of every turn (IGPO, arXiv 2510.14967): how much it raised the belief in the right answer.

    With $b_k$ the log-belief before turn k, in nats,

    $$g_k = \exp b_{k+1} - \exp b_k \quad (\texttt{prob\_diff}), \qquad g_k = b_{k+1} - b_k \quad
    (\texttt{log\_prob\_diff}), \qquad g_k = \log \frac{\varepsilon - b_k}{\varepsilon - b_{k+1}} \quad
    (\texttt{log\_gap}),$$

    where $-b_k$ is the gap to certainty and $\varepsilon = 0.1$. A `log_gap` gain is the factor by which the gap
    shrinks. It sees what happens to a belief of 1e-6, where `prob_diff` vanishes, and stays small, where
    `log_prob_diff` is huge; it is bounded, because a belief above 0.9 counts as certain.

    The last turn has no gain: its reward is the outcome. Without `spans`, the `prob_diff` gains of a rollout add up to
    the probability before its last turn minus that of the prompt.

    Args:
        log_beliefs (`torch.Tensor` of shape (B, K)): Mean log-probability of the answer's tokens before each turn, NaN
            beyond the last turn and wherever the belief was not scored.
        info_gain (`str`, *optional*, defaults to `"prob_diff"`): `"prob_diff"`, the difference of probabilities
            (preprint), `"log_prob_diff"`, that of log-probabilities (published version, Eq. 4), or `"log_gap"`, the
            log-ratio of the gaps to certainty (TRACE, arXiv 2607.13988).
        spans (list of list of `tuple[int, int]`, *optional*): For each rollout the spans of turns to measure (see
            [`gain_spans`]): the gain of span (a, b) is the belief before turn b minus that before turn a, and stands
            at turn b - 1. By default every turn.
        clip (`float`, *optional*): largest absolute gain; what is beyond it counts as this.
        before (`torch.Tensor` of shape (B, K), *optional*): log-beliefs to compare with, for each turn in place of
            the belief before it; NaN where that stays. For spans of one turn.

    Returns:
        `torch.Tensor` of shape (B, K): gains, NaN where there is none; a rollout of one turn has none at all.

    Raises:
        `ValueError`: if `log_beliefs` is not a matrix, `spans` has another number of rollouts, or `info_gain` is
            unknown.
    """
    if info_gain not in GAINS:
        raise ValueError(f"`info_gain` must be one of {', '.join(GAINS)}, got {info_gain!r}.")
    if log_beliefs.dim() != 2 or (spans is not None and len(spans) != len(log_beliefs)):
        raise ValueError(
            f"`log_beliefs` must be (B, K) and `spans` have one list per rollout, got {tuple(log_beliefs.shape)} and "
            f"{None if spans is None else len(spans)} lists."
        )
    belief = GAINS[info_gain](log_beliefs)
    start = belief if before is None else torch.where(before.isnan(), belief, GAINS[info_gain](before))
    gain = torch.full_like(belief, torch.nan)
    if spans is None:
        gain[:, :-1] = belief[:, 1:] - start[:, :-1]
    elif places := [(i, a, b) for i, of_rollout in enumerate(spans) for a, b in of_rollout]:
        rollout, first, end = torch.tensor(places, device=belief.device).T
        gain[rollout, end - 1] = belief[rollout, end] - start[rollout, first]
    return gain if clip is None else gain.clamp(-clip, clip)


def first_seen_gains(
    seen: Sequence[Sequence[bool]], spans: Sequence[Sequence[tuple[int, int]]], max_turns: int
) -> torch.Tensor:
    """
    Gains of 1 where an answer is read for the first time (TSPO, arXiv 2601.22776).

    Args:
        seen (list of list of `bool`): for each rollout, whether the observation after each turn contains an answer.
        spans (list of list of `tuple[int, int]`): the spans of turns to measure, see [`gain_spans`].
        max_turns (`int`): K.

    Returns:
        `torch.Tensor` of shape (B, K): 1 for the span with the first such observation, 0 for the others, and NaN where
        no span ends.
    """
    gains = torch.full((len(seen), max_turns), torch.nan)
    for i, (of_rollout, of_spans) in enumerate(zip(seen, spans, strict=True)):
        first = next((k for k, has_answer in enumerate(of_rollout) if has_answer), -1)
        for a, b in of_spans:
            gains[i, b - 1] = float(a <= first < b)
    return gains


def expand_to_tokens(turn_values: torch.Tensor, turn_index: torch.Tensor) -> torch.Tensor:
    """
    Give every sampled token the value of its turn, and every other token 0.

    Args:
        turn_values (`torch.Tensor` of shape (B, K)): one value per turn.
        turn_index (`torch.Tensor` of shape (B, T)): turn of each token, -1 for none (see [`turn_spans`]).

    Returns:
        `torch.Tensor` of shape (B, T), of the dtype of `turn_values`.
    """
    values = turn_values.gather(1, turn_index.clamp(min=0))
    return values.masked_fill(turn_index < 0, 0.0)


def old_log_probs_of_turn_ratios(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, sampled_mask: torch.Tensor
) -> torch.Tensor:
    r"""
    Old log-probabilities to which the token ratios of `log_probs` are the ratios of turns.

    The ratio of turn k is the geometric mean of its tokens' ratios, as GSPO's (arXiv 2507.18071) is of a sequence's:

    $$s_k = \exp\Big(\frac{1}{|k|} \sum_{t \in k} \log \frac{\pi(y_t)}{\pi_\text{old}(y_t)}\Big).$$

    Every token of the turn gets it, with its gradient in all of them: the result carries one. At a ratio of 1 the
    gradient of the loss is that of token ratios.

    Args:
        log_probs (`torch.Tensor` of shape (B, T)): log-probabilities of the policy that is trained, with gradient.
        old_log_probs (`torch.Tensor` of shape (B, T)): those of the policy that sampled.
        sampled_mask (`torch.Tensor` of shape (B, T)): 1 on tokens sampled from the policy; a turn is a run of ones.

    Returns:
        `torch.Tensor` of shape (B, T): $\log \pi(y_t) - \log s_k$; `old_log_probs` where nothing was sampled.
    """
    turn_index, _, _ = turn_spans(sampled_mask, sampled_mask.new_full(sampled_mask.shape[:1], sampled_mask.shape[1]))
    is_sampled = turn_index >= 0
    slot = turn_index + 1  # slot 0 collects the tokens of no turn
    log_ratio = (log_probs - old_log_probs).masked_fill(~is_sampled, 0.0)
    zeros = log_ratio.new_zeros(len(slot), slot.shape[1] + 1)
    counts = zeros.scatter_add(1, slot, torch.ones_like(log_ratio))
    mean = (zeros.scatter_add(1, slot, log_ratio) / counts.clamp(min=1.0)).gather(1, slot)
    return torch.where(is_sampled, log_probs - mean, old_log_probs)
