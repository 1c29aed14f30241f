"""What the policy would have believed and done if it had read something else: contexts with another observation.

Axes: B rollouts, K turns.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from ..beliefs.probes import AnswerProbe
from ..beliefs.scorer import BeliefBatch, BeliefScorer


class Read(NamedTuple):
    """A rollout as the policy read it: of K turns, the first K - 1 are followed by an observation."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    observations: Sequence[tuple[int, int]]  # spans in the completion
    ends: Sequence[int]  # where in the completion the sampled tokens of each turn end

    def before(self, turn: int) -> list[int]:
        """Everything up to the end of a turn, without what was read after it."""
        return [*self.prompt_ids, *self.completion_ids[: self.ends[turn]]]

    def observation(self, turn: int) -> list[int]:
        """What was read after a turn."""
        return list(self.completion_ids[slice(*self.observations[turn])])

    @property
    def all_read(self) -> list[list[int]]:
        """What was read after each turn but the last."""
        return [self.observation(turn) for turn in range(len(self.observations))]

    def next_turn(self, turn: int) -> list[int]:
        """What was sampled after that."""
        return list(self.completion_ids[self.observations[turn][1] : self.ends[turn + 1]])


def reads_of(step: Any) -> list[Read]:
    """The rollouts of a [`Step`]."""
    reads = []
    for prompt, ids, starts, index in zip(
        step.prompt_ids, step.completion_ids, step.turn_starts, step.turn_index.tolist(), strict=True
    ):
        ends = [start + index.count(k) for k, start in enumerate(starts)]
        spans = [(end, start) for end, (_, start) in zip(ends, pairwise(starts), strict=False)]
        reads.append(Read(prompt, ids, spans, ends))
    return reads


def foreign_beliefs(step: Any, scorer: BeliefScorer, model: nn.Module) -> torch.Tensor:
    """
    Belief after every search if it had found what a search for another question found (IG-Search, arXiv 2604.15148).

    Args:
        step ([`Step`]): whose rollouts are scored. The choice among the observations of other questions depends on the
            number of the step and of the process. Every process must call this.
        scorer ([`BeliefScorer`]), model (`nn.Module`): what scores.

    Returns:
        `torch.Tensor` of shape (B, K): log-beliefs after turn k, in nats; NaN after the last turn, and where the batch
        holds no observation of another question.
    """
    choice, reads = random.Random(f"{step.optimizer_step} {step.rank}"), reads_of(step)
    groups = [(step.rank * len(reads) + i) // step.num_generations for i in range(len(reads))]
    found = [(group, read.observation(k)) for read, group in zip(reads, groups, strict=True) for k in _searches(read)]
    foreign = {group: [ids for owner, ids in found if owner != group] for group in set(groups)}
    places = [(i, k) for i, read in enumerate(reads) if foreign[groups[i]] for k in _searches(read)]
    contexts = [[*reads[i].before(k), *choice.choice(foreign[groups[i]])] for i, k in places]
    batch = scorer.begin([step.answers[i] for i, _ in places])
    scores = scorer.score(model, batch, contexts, [[len(context)] for context in contexts])
    table = torch.full(step.starts.shape, torch.nan)
    for place, score in zip(places, scores, strict=True):
        table[place] = score
    return table


def evidence_used(
    step: Any, scorer: BeliefScorer, model: nn.Module, encode: Callable[[list[list[dict[str, Any]]]], list[list[int]]]
) -> torch.Tensor:
    """
    How much less likely the policy's next turns are without the observation that it had just read (CIPO, arXiv
    2608.06128).

    Args:
        step ([`Step`]): whose rollouts are scored; every process must call this.
        scorer ([`BeliefScorer`]), model (`nn.Module`): what scores.
        encode (`Callable`): encodes tool messages; here their content is empty.

    Returns:
        `torch.Tensor` of shape (B,): log-probability per token with the observation, less that with an empty one, in
        nats, averaged over the turns of the rollout; NaN if none follows an observation.
    """
    reads = reads_of(step)
    places = [(i, k) for i, read in enumerate(reads) for k in _searches(read) if read.next_turn(k)]
    messages = [
        [{"role": "tool", "name": name, "content": ""} for name in step.tools_called[i][k] or ["tool"]]
        for i, k in places
    ]
    contexts, probes = [], []
    for (i, k), empty in zip(places, encode(messages), strict=True):
        turn = reads[i].next_turn(k)
        contexts += [[*reads[i].before(k), *reads[i].observation(k)], [*reads[i].before(k), *empty]]
        probes += [[AnswerProbe(turn, 0, len(turn))]] * 2
    scores = scorer.score(model, BeliefBatch(probes), contexts, [[len(context)] for context in contexts])
    differences = (torch.cat([*scores, torch.zeros(0)]).view(-1, 2) @ torch.tensor([1.0, -1.0])).tolist()
    by_rollout: list[list[float]] = [[] for _ in reads]
    for (i, _), difference in zip(places, differences, strict=True):
        by_rollout[i].append(difference)
    return torch.tensor([sum(values) / len(values) if values else torch.nan for values in by_rollout])


def _searches(read: Read) -> range:
    """The turns after which something was read."""
    return range(len(read.observations))
