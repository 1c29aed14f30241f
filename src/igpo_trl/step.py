"""One generation batch, from its rollouts to its advantages: what the hooks of a training step hand to each other."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .advantages import turn_advantages
from .beliefs import CachedContexts
from .beliefs.scorer import BeliefBatch, BeliefScorer
from .checks import own_answers
from .data.rows import answers_of
from .rewards import LAST_TURN, exact_match, extract_answer, f1_score, last_assistant_text, mentions
from .rollout.kv_cache import PrefixCache
from .rollout.round_log import RoundLog
from .rollout.state import Rollout
from .training.counterfactuals import reads_of
from .training.diagnostics import belief_metrics, credit_metrics, outcome_collapse, without_infinite
from .turns import FIRST_SEEN, expand_to_tokens, first_seen_gains, gain_spans, information_gain, turn_spans

SCORES = {"f1": f1_score, "exact_match": exact_match}


@dataclass
class Step:
    """
    One generation batch of one rank: rollouts → outcomes → beliefs → gains → advantages → metrics and records.

    [`IGPOTrainer`] makes one per batch and fills it in the order below. Attributes named `global_…` cover the N
    rollouts of all ranks, in the order of ranks; all others cover the B rollouts of this rank. Axes: T completion
    tokens, K turns.

    Attributes:
        rows (list of `dict`): rows of the data set.
        training (`bool`): whether the batch is trained on.
        num_generations (`int`): group size G.
        answer_column (`str`): column of `rows` with the right answers.
        info_gain (`str`), gain_clip (`float`, *optional*), info_gain_every (`int`), info_gain_tools (list of `str`,
            *optional*): how gains are measured, as in [`IGPOConfig`].
        scores_every_turn (`bool`): whether to score the belief before every turn, even if no gain needs it.
        optimizer_step (`int`): number of optimizer steps taken so far.
        rank (`int`): index of this process.
        num_counted (`int`, *optional*): the first rollouts of all ranks that count in metrics. Evaluation on several
            processes fills its last batch with rows that it has already had. Defaults to all.
        started, seconds (`float`, *optional*): when generation began, and how long it took.

        kv_cache ([`PrefixCache`], *optional*): of the rollouts in progress; only while they are sampled.
        belief_batch ([`BeliefBatch`], *optional*): beliefs scored so far; `None` if none are wanted.
        captures_old_log_probs (`bool`): whether TRL's forward for the old log-probabilities is still to come, and
            beliefs are to be scored against its KV cache.

        round_log ([`RoundLog`]): counts of the rollout loop.
        prompt_ids, completion_ids (list of list of `int`): token ids.
        turn_index (`torch.Tensor` of shape (B, T)), starts (B, K), num_turns (B,): see [`turn_spans`].
        turn_starts (list of list of `int`): `starts` without padding.
        completions (list): the completions as messages or text.
        last_turns (list of `str`, *optional*): what was sampled last, of rollouts that a `rollout_func` made.

        global_rewards (`torch.Tensor` of shape (N, reward functions)): NaN where a function does not apply.
        global_outcome (`torch.Tensor` of shape (N,)): their weighted sum; NaN where none applies.

        baseline (`torch.Tensor` of shape (B, K), *optional*), evidence_used (B,): see [`foreign_beliefs`] and
            [`evidence_used`].
        beliefs, gains (`torch.Tensor` of shape (B, K), *optional*): probability of the answer before each turn, and
            the information gain of each turn; NaN where there is none.
        global_beliefs, global_gains (`torch.Tensor` of shape (N, K)), global_num_turns (N,): the same, gathered.
        global_advantages (`torch.Tensor` of shape (N, K), *optional*): what the turns are trained with.
        credit (`dict`): metrics of what the turns are trained with, see [`credit_metrics`].
    """

    rows: list[dict[str, Any]]
    training: bool
    num_generations: int = 1
    answer_column: str = "answers"
    info_gain: str = "prob_diff"
    gain_clip: float | None = None
    info_gain_every: int = 1
    info_gain_tools: Sequence[str] | None = None
    scores_every_turn: bool = True
    optimizer_step: int = 0
    rank: int = 0
    num_counted: int | None = None
    started: float | None = None
    seconds: float | None = None

    kv_cache: PrefixCache | None = None
    belief_batch: BeliefBatch | None = None
    captures_old_log_probs: bool = False

    round_log: RoundLog = field(default_factory=RoundLog)
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    completions: Sequence[Any] = ()
    last_turns: list[str] | None = None

    baseline: torch.Tensor | None = None
    evidence_used: torch.Tensor | None = None
    beliefs: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    global_beliefs: torch.Tensor | None = None
    global_gains: torch.Tensor | None = None
    global_advantages: torch.Tensor | None = None
    credit: dict[str, float] = field(default_factory=dict)

    @cached_property
    def answers(self) -> list[tuple[str, ...]]:
        """Right answers of each rollout; raises `ValueError` for a row that has none."""
        return [answers_of(row, self.answer_column) for row in self.rows]

    @cached_property
    def predictions(self) -> list[str | None]:
        """The answer that each rollout gave; `None` where it is missing or malformed."""
        texts = self.last_turns or [last_assistant_text(completion) for completion in self.completions]
        return [extract_answer(text) for text in texts]

    # ----------------------------------------------------------------------------------------------------- rollouts

    def sampled_mask(self, width: int) -> torch.Tensor:
        """1 on the tokens that were sampled, of shape (B, width): TRL may have padded the completions further."""
        return torch.nn.functional.pad(self.turn_index >= 0, (0, width - self.turn_index.shape[1]))

    def take_answers(self, environments: Sequence[Any] | None) -> None:
        """Fill in the answers that a row does not have with those that its environment has after its `reset`."""
        if not any(map(own_answers, environments or ())):
            return
        for row, environment in zip(self.rows, environments or (), strict=True):
            if row.get(self.answer_column) is None:
                owned = {self.answer_column: getattr(environment, "answers", None)}
                where = f"`{type(environment).__name__}.answers` after its `reset`"
                row[self.answer_column] = list(answers_of(owned, self.answer_column, where))

    def set_rollouts(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        sampled_masks: Sequence[Sequence[int]] | None,
    ) -> None:
        """
        Take over the rollouts and find their turns.

        Args:
            prompt_ids, completion_ids (list of list of `int`): token ids.
            sampled_masks (list of list of `int`, *optional*): 1 on sampled tokens, 0 on observations (TRL calls it
                `tool_mask`); `None` if all were sampled.
        """
        self.seconds = None if self.started is None else time.perf_counter() - self.started
        self.prompt_ids = [list(ids) for ids in prompt_ids]
        self.completion_ids = [list(ids) for ids in completion_ids]
        masks = sampled_masks or [[1] * len(ids) for ids in self.completion_ids]
        sampled_mask = pad_sequence([torch.tensor(mask, dtype=torch.long) for mask in masks], batch_first=True)
        lengths = torch.tensor([len(ids) for ids in self.completion_ids])
        self.turn_index, self.starts, self.num_turns = turn_spans(sampled_mask, lengths)
        self.turn_starts = [row[:n] for row, n in zip(self.starts.tolist(), self.num_turns.tolist(), strict=True)]

    def set_last_turns(self, tokenizer: Any) -> None:
        """Decode what was sampled last; to TRL, the completions of a `rollout_func` are one turn each."""
        last = (self.turn_index == (self.num_turns - 1)[:, None]).tolist()
        ids = [list(compress(row, mask)) for row, mask in zip(self.completion_ids, last, strict=True)]
        self.last_turns = tokenizer.batch_decode(ids, skip_special_tokens=True)

    def with_last_turns(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows for the reward functions, with the last turns as a column where there are any."""
        if self.last_turns is None:
            return rows
        return [row | {LAST_TURN: text} for row, text in zip(rows, self.last_turns, strict=True)]

    @classmethod
    def from_output(cls, rows: list[dict[str, Any]], output: dict[str, Any], **fields: Any) -> "Step":
        """The step of a batch that `GRPOTrainer._generate_and_score_completions` returned."""

        def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
            return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]

        step = cls(rows, **fields)
        completion_mask = output["completion_mask"]
        sampled_mask = output.get("tool_mask")
        step.set_rollouts(
            unpadded(output["prompt_ids"], output["prompt_mask"]),
            unpadded(output["completion_ids"], completion_mask),
            None if sampled_mask is None else unpadded(sampled_mask, completion_mask),
        )
        return step

    @property
    def tools_called(self) -> Sequence[Sequence[tuple[str, ...]]]:
        """Names of the tools that each turn of each rollout called; empty where no loop of ours ran them."""
        return self.round_log.tools_called or [()] * len(self.completion_ids)

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and completion of each rollout."""
        return [prompt + ids for prompt, ids in zip(self.prompt_ids, self.completion_ids, strict=True)]

    # ----------------------------------------------------------------------------------------- outcomes and beliefs

    def set_rewards(
        self, global_rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str] = ()
    ) -> torch.Tensor:
        """
        Take over the gathered values of the reward functions, and add them up as TRL does.

        Args:
            global_rewards (`torch.Tensor` of shape (N, reward functions)): NaN where a function does not apply.
            weights (`torch.Tensor` of shape (reward functions,)): of the sum.
            names (list of `str`, *optional*): of the functions, for the warning about infinite values.

        Returns:
            `torch.Tensor` of shape (N, reward functions): the rewards, with NaN in place of infinite ones, any of
                which would make all weights of the model NaN.
        """
        global_rewards = without_infinite(global_rewards, names)
        if self.num_counted is not None:
            global_rewards[self.num_counted :] = torch.nan
        self.global_rewards = global_rewards
        total = (global_rewards * weights.to(global_rewards.device)).nansum(dim=1)
        self.global_outcome = total.masked_fill(global_rewards.isnan().all(dim=1), torch.nan)
        return global_rewards

    def score_ended_rollouts(self, scorer: BeliefScorer, model: nn.Module, rollouts: Sequence[Rollout]) -> None:
        """Score the beliefs of rollouts that have ended against the part of the KV cache that they leave."""
        cache, batch = self.kv_cache, self.belief_batch
        if cache is None or batch is None:
            return
        ended = [rollout for rollout in rollouts if rollout.index in cache]
        longest = max((len(rollout.context_ids) for rollout in ended), default=0) + batch.longest_probe
        if not ended or cache.has_long_rows or not scorer.can_use_cache(model, longest, without_dropout=True):
            return
        scored = []
        for rollout in ended:
            sequence, starts = rollout.context_ids, rollout.turn_starts
            row, padding, length = cache.cached_row(rollout.index, sequence)
            turns = self.turns_to_score(len(starts), rollout.tools_called)
            boundaries = [len(rollout.prompt_ids) + starts[turn] for turn in turns]
            if boundaries := [boundary for boundary in boundaries if boundary <= length]:
                scored.append((rollout.index, sequence, boundaries, row, padding))
        if scored:
            indices, sequences, boundaries_of, rows, paddings = map(list, zip(*scored, strict=True))
            # `generate` counts positions from a row's first token.
            contexts = CachedContexts(cache.cache, rows, paddings, [0] * len(rows))
            scorer.score_cached(model, batch, contexts, indices, sequences, boundaries_of)

    def score_captured_rows(
        self, scorer: BeliefScorer, model: nn.Module, padding: Sequence[int], cache: Any, first: int, size: int
    ) -> None:
        """
        Score the beliefs of rows of the batch against the KV cache of TRL's forward of them.

        Args:
            scorer ([`BeliefScorer`]), model (`nn.Module`): what scores, and what made the cache.
            padding (list of `int`): left padding of every row of the batch.
            cache (`DynamicCache`): with a row for each of the rows `first` … `first + size - 1`.
        """
        assert self.belief_batch is not None  # or nothing would be captured
        rows = slice(first, first + size)
        # TRL counts positions from a row's first slot.
        contexts = CachedContexts(cache, range(size), padding[rows], padding[rows])
        indices = range(first, first + size)
        sequences = [self.prompt_ids[i] + self.completion_ids[i] for i in indices]
        scorer.score_cached(
            model, self.belief_batch, contexts, indices, sequences, self.boundaries[rows], in_step=True
        )

    def score_beliefs(self, scorer: BeliefScorer, model: nn.Module) -> None:
        """Beliefs and gains of the batch; what no cache has given yet takes a forward. Every rank must call this."""
        assert self.belief_batch is not None
        self.set_beliefs(scorer.score(model, self.belief_batch, self.sequences, self.boundaries))

    def set_beliefs(self, log_beliefs: Sequence[torch.Tensor]) -> None:
        """Take over the log-beliefs at each rollout's `boundaries`, in nats, and turn them into gains."""
        # On the CPU: they are small, and not every accelerator has float64.
        table = torch.full(self.starts.shape, torch.nan)
        scored = self.scored_turns
        rows = [i for i, turns in enumerate(scored) for _ in turns]
        table[rows, [turn for turns in scored for turn in turns]] = torch.cat([*log_beliefs])
        self.beliefs = table.exp()
        if self.info_gain != FIRST_SEEN:
            spans, clip, before = self.all_gain_spans, self.gain_clip, self.baseline
            self.gains = information_gain(table, self.info_gain, spans=spans, clip=clip, before=before)

    def set_first_seen(self, tokenizer: Any) -> None:
        """Gains from which observation of each rollout is the first to contain an answer."""
        observations = [
            [rollout.observation(k) for k in range(len(rollout.observations))] for rollout in reads_of(self)
        ]
        seen = [
            [mentions(tokenizer.decode(ids), answers) for ids in of_rollout]
            for of_rollout, answers in zip(observations, self.answers, strict=True)
        ]
        self.gains = first_seen_gains(seen, self.all_gain_spans, self.starts.shape[1])
        if self.beliefs is None:
            self.beliefs = torch.full_like(self.gains, torch.nan)

    @property
    def all_gain_spans(self) -> list[list[tuple[int, int]]]:
        """The spans of turns over which gains are measured, of each rollout."""
        return [self.gain_spans(*rollout) for rollout in self._turns_and_tools]

    def gain_spans(self, num_turns: int, tools_called: Sequence[Any]) -> list[tuple[int, int]]:
        """The spans of turns of a rollout over which gains are measured."""
        return gain_spans(num_turns, tools_called, every=self.info_gain_every, tools=self.info_gain_tools)

    def turns_to_score(self, num_turns: int, tools_called: Sequence[Any]) -> list[int]:
        """The turns of a rollout before which the belief is needed."""
        if self.scores_every_turn:
            return list(range(num_turns))
        spans = self.gain_spans(num_turns, tools_called)
        # The first and the last belief are recorded wherever there is any.
        return sorted({turn for span in spans for turn in span} | {0, num_turns - 1}) if spans else []

    @property
    def scored_turns(self) -> list[list[int]]:
        """The turns before which the belief is needed, of each rollout."""
        return [self.turns_to_score(*rollout) for rollout in self._turns_and_tools]

    @property
    def boundaries(self) -> list[list[int]]:
        """Lengths of the contexts before these turns."""
        return [
            [len(prompt) + starts[k] for k in turns]
            for prompt, starts, turns in zip(self.prompt_ids, self.turn_starts, self.scored_turns, strict=True)
        ]

    @property
    def _turns_and_tools(self) -> Iterator[tuple[int, Sequence[Any]]]:
        return zip(self.num_turns.tolist(), self.tools_called, strict=True)

    def gather(self, accelerator: Any) -> None:
        """Share turn counts, and beliefs and gains if there are any, over all ranks; every rank must call this."""
        device = accelerator.device
        self.global_num_turns = accelerator.gather(self.num_turns.to(device)).cpu()
        if self.gains is None or self.beliefs is None:
            return
        # K differs between ranks: pad to the largest.
        local = torch.stack([self.gains, self.beliefs], dim=-1).to(device)
        shared = accelerator.gather(accelerator.pad_across_processes(local, dim=1, pad_index=torch.nan)).cpu()
        self.global_gains, self.global_beliefs = shared[..., 0].contiguous(), shared[..., 1].contiguous()

    # --------------------------------------------------------------------------------------------------- advantages

    def set_advantages(self, **options: Any) -> None:
        """Compute the advantages of all turns from the gathered gains and outcomes; options of [`turn_advantages`]."""
        assert self.global_gains is not None  # `gather` comes first
        batch = (self.global_gains, self.global_outcome.cpu(), self.global_num_turns, self.num_generations)
        self.global_advantages = turn_advantages(*batch, beliefs=self.global_beliefs, **options)
        self.credit = credit_metrics(*batch, self.global_advantages, beliefs=self.global_beliefs, **options)

    def token_advantages(self, like: torch.Tensor) -> torch.Tensor:
        """Advantage of every sampled token and 0 elsewhere, (B, T), as wide as the completions `like` (B, T)."""
        turn_index = pad(self.turn_index, (0, like.shape[1] - self.turn_index.shape[1]), value=-1).to(like.device)
        advantages = self.local(self.global_advantages)[:, : self.starts.shape[1]]
        return expand_to_tokens(advantages.to(like.device), turn_index)

    @property
    def num_counted_here(self) -> int | None:
        """How many of this rank's rollouts count in metrics."""
        return None if self.num_counted is None else max(0, self.num_counted - self.rank * len(self.rows))

    def local(self, global_values: Any) -> Any:
        """This rank's part of gathered values."""
        size = len(self.completion_ids)
        return global_values[self.rank * size :][:size]

    # ------------------------------------------------------------------------------------------------------ metrics

    def metrics(self, gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """Metrics of the global batch, by name; every rank must call this, after `gather` and `set_advantages`."""
        turns = self.global_num_turns[: self.num_counted].float()
        metrics = {"rollout/turns/mean": turns.mean().item(), "rollout/turns/max": turns.max().item()}
        if not self.training and self.answer_column in self.rows[0]:
            # F1 and exact match whatever the reward functions are: what runs are compared by.
            for name, score in SCORES.items():
                local = [score(*pair) for pair in zip(self.predictions, self.answers, strict=True)]
                metrics[name] = gather(torch.tensor(local, device=device))[: self.num_counted].mean().item()
        if self.belief_batch is not None:
            metrics["belief/seconds"] = self.belief_batch.seconds
        if self.global_beliefs is not None:
            counted = slice(self.num_counted)
            # A rank correlation of an evaluation is no mean of those of its batches.
            outcome = self.global_outcome[counted].cpu() if self.training else None
            batch = (self.global_beliefs[counted], self.global_num_turns[counted])
            metrics |= belief_metrics(self.gains_that_count, *batch, outcome)
        if self.evidence_used is not None:
            metrics["evidence/used"] = gather(self.evidence_used.to(device)).nanmean().item()
        if self.training:
            metrics["collapse/outcome"] = outcome_collapse(self.global_outcome, self.num_generations)
        return metrics | self.credit

    @property
    def gains_that_count(self) -> torch.Tensor:
        """All gains of the rollouts that count."""
        assert self.global_gains is not None  # `gather` comes first
        gains = self.global_gains[: self.num_counted]
        return gains[~gains.isnan()]
