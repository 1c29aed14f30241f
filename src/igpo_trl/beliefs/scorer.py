"""
When beliefs are scored, and against which KV cache.

Scoring needs the keys and values of a rollout and then runs the probes alone, so it happens where these are already
available:

    rollout loop         its own KV cache, when it ends              score_cached
    old log-probs        the cache of TRL's forward ([`KVCapture`])  score_cached
    end of the step      a forward of its own, for what is left      score

Scores are memoized by context and probe, so nothing is scored twice, and a wrong guess about which beliefs will be
needed costs time but never changes a value.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from .models import cache_argument, cached_obstacle, packed_obstacle
from .probes import DEFAULT_TEMPLATE, AnswerProbe, build_probes
from .scoring import (
    AliasReduction,
    CachedContexts,
    Method,
    check_beliefs,
    reduce_aliases,
    rounding_error,
    score_beliefs,
)

logger = logging.getLogger(__name__)


@dataclass
class BeliefBatch:
    """
    What is known of the beliefs of one generation batch while it is being made.

    Attributes:
        probes (list of list of [`AnswerProbe`]): of each rollout, one per alias of the answer.
        memo (`dict`): scores so far, by context and probe.
        seconds (`float`): time spent on scoring.
        log_probs (list of `torch.Tensor` of shape (boundaries, aliases)): of each rollout, once all are scored.
    """

    probes: list[list[AnswerProbe]]
    memo: dict[Hashable, float] = field(default_factory=dict)
    seconds: float = 0.0
    log_probs: list[torch.Tensor] = field(default_factory=list)

    @property
    def longest_probe(self) -> int:
        """Tokens of the longest probe."""
        return max((len(probe.token_ids) for probes in self.probes for probe in probes), default=0)


class BeliefScorer:
    """
    Scores the beliefs of generation batches.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): makes the probes' tokens.
        template (`str`, *optional*): text with the answer's slot, fitted to the generation prompt.
        method (`str`, *optional*, defaults to `"auto"`): as in [`score_beliefs`]; `"auto"` is settled on the first
            batch, by comparing packed scores with plain forwards.
        alias_reduction (`str`, *optional*, defaults to `"max"`): how the beliefs in several aliases become one.
        max_answer_tokens (`int`, *optional*): longest answer scored.
        tokens_per_batch (`int`, *optional*, defaults to `16384`): tokens per forward.
        max_over_ranks (`Callable`, *optional*): the maximum of a number over all ranks.
    """

    carried = ("trusts_cache", "settled_method", "compared_cache")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = DEFAULT_TEMPLATE,
        *,
        method: Method = "auto",
        alias_reduction: AliasReduction = "max",
        max_answer_tokens: int | None = None,
        tokens_per_batch: int = 16_384,
        max_over_ranks: Callable[[int], int] = int,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.method = method
        self.alias_reduction = alias_reduction
        self.max_answer_tokens = max_answer_tokens
        self.tokens_per_batch = tokens_per_batch
        self.max_over_ranks = max_over_ranks
        self.trusts_cache = True  # until scores against a cache differ from those of plain forwards
        self.settled_method: Method | None = None if method == "auto" else method
        self.compared_cache = method == "packed"

    def begin(self, answers: Sequence[tuple[str, ...]]) -> BeliefBatch:
        """Start a batch; `answers` holds the aliases of each rollout's answer."""
        probes = {
            aliases: build_probes(self.tokenizer, aliases, self.template, self.max_answer_tokens)
            for aliases in set(answers)
        }
        return BeliefBatch([probes[aliases] for aliases in answers])

    def can_use_cache(
        self, model: nn.Module, longest: int, *, counts_padding: bool = False, without_dropout: bool = False
    ) -> bool:
        """
        Whether beliefs may be scored against the cache of another forward of this model.

        Args:
            model (`nn.Module`): what that forward is of, in the mode it runs in unless `without_dropout`.
            longest (`int`): tokens of the longest context, with its probe.
            counts_padding (`bool`, *optional*, defaults to `False`): whether that forward counts left padding as
                positions.
            without_dropout (`bool`, *optional*, defaults to `False`): whether dropout is off in it whatever the mode,
                and positions count from a row's first token.
        """
        if not self.trusts_cache or self.settled_method == "per_turn" or packed_obstacle(model, longest):
            return False
        return without_dropout or cached_obstacle(model, counts_padding) is None

    def score_cached(
        self,
        model: nn.Module,
        batch: BeliefBatch,
        contexts: CachedContexts,
        rollouts: Sequence[int],
        sequences: Sequence[Sequence[int]],
        boundaries: Sequence[Sequence[int]],
        *,
        in_step: bool = False,
    ) -> None:
        """
        Score rollouts against keys and values that another forward left, into the batch's memo.

        Args:
            model (`nn.Module`): what made the keys and values, with the weights that it had.
            batch ([`BeliefBatch`]): of these rollouts.
            contexts ([`CachedContexts`]): keys and values, in the order of `rollouts`.
            rollouts (list of `int`): indices within this rank's batch.
            sequences, boundaries: as for [`score_beliefs`].
            in_step (`bool`, *optional*, defaults to `False`): whether every rank calls this equally often and must
                make the same number of forwards.
        """
        started = time.perf_counter()
        score_beliefs(
            model,
            sequences,
            boundaries,
            [batch.probes[i] for i in rollouts],
            tokens_per_batch=self.tokens_per_batch,
            synchronize=self.max_over_ranks if in_step else None,
            cached=contexts,
            memo=batch.memo,
        )
        batch.seconds += time.perf_counter() - started

    def score(
        self,
        model: nn.Module,
        batch: BeliefBatch,
        sequences: Sequence[Sequence[int]],
        boundaries: Sequence[Sequence[int]],
    ) -> list[torch.Tensor]:
        """
        Log-beliefs of all rollouts of the batch; every rank must call this.

        Args:
            model (`nn.Module`): the policy.
            batch ([`BeliefBatch`]): as [`BeliefScorer.begin`] made it; what its memo holds is not run again.
            sequences, boundaries: as for [`score_beliefs`].

        Returns:
            list of `torch.Tensor`: per rollout (boundaries,), in nats, reduced over aliases.
        """
        started = time.perf_counter()
        if self.settled_method is None:
            refused = check_beliefs(model, sequences, boundaries, batch.probes, synchronize=self.max_over_ranks)
            self.settled_method = "per_turn" if refused else "auto"
        method = self.settled_method
        if method == "packed" and packed_obstacle(model, 0) is None:
            method = "auto"  # a batch that is too long for its position embeddings is scored per turn
        memo = batch.memo
        compares = not self.compared_cache and self.max_over_ranks(len(memo)) > 0
        if compares:
            memo = {}  # this once all beliefs are scored anew, and compared
        log_probs = score_beliefs(
            model,
            sequences,
            boundaries,
            batch.probes,
            method=method,
            tokens_per_batch=self.tokens_per_batch,
            synchronize=self.max_over_ranks,
            memo=memo,
        )
        if compares:
            self._compare(model, batch.memo, memo)
        beliefs = [
            reduce_aliases(values, self.alias_reduction) if len(values) else values.new_zeros(0)
            for values in log_probs
        ]
        batch.seconds += time.perf_counter() - started
        batch.log_probs = log_probs
        return beliefs

    def _compare(self, model: nn.Module, cached: dict[Hashable, float], plain: dict[Hashable, float]) -> None:
        """Stop using caches of other forwards if scores against them differ from those of plain forwards."""
        self.compared_cache = True
        difference = max(
            (abs(value - plain[key]) / max(1.0, abs(plain[key])) for key, value in cached.items() if key in plain),
            default=0.0,
        )
        allowed = rounding_error(model)
        differs = not difference <= allowed  # true for NaN
        if self.max_over_ranks(int(differs)):
            self.trusts_cache = False
            logger.warning(
                "Beliefs are scored by forwards of their own: against the KV cache of the rollout they differ by "
                "%.2g nats%s, where rounding explains %.2g. Please report this model.",
                difference,
                "" if differs else " on this rank, and by more on another",
                allowed,
            )


class _Cache(DynamicCache):
    """A subclass, because FSDP2 takes containers that it knows apart and hands the model a copy."""


class KVCapture:
    """
    A model that passes on the KV cache of each of its forwards; everything else is the model's own.

    Args:
        model (`nn.Module`): what is called, with `position_ids` if several rollouts are packed into one row.
        on_forward (`Callable`): called after each forward with its cache, the index of its first row and its number
            of rows. The rollouts of a packed row have become rows that begin at the left.
    """

    def __init__(self, model: Any, on_forward: Callable[[DynamicCache, int, int], None]):
        self._model = model
        self._on_forward = on_forward
        self._num_rows = 0

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        cache = _Cache()  # without a config, because layers with a window would drop tokens
        output = self._model(input_ids=input_ids, **{cache_argument(self._model): cache}, **inputs)
        size = len(input_ids)
        shared = inputs.get("packed_lengths", (0,))[0]  # tokens with which every rollout of a packed row begins
        starts = inputs["position_ids"][0].eq(shared).nonzero()[:, 0] if "position_ids" in inputs else None
        if starts is not None:
            size = len(starts)
        if cache.get_seq_length() == input_ids.shape[1]:  # some models fill no cache unless they are asked to
            if starts is not None:
                _unpack(cache, starts, shared)
            self._on_forward(cache, self._num_rows, size)
        self._num_rows += size
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _unpack(cache: DynamicCache, starts: torch.Tensor, shared: int) -> None:
    """Give every rollout of a packed row, which goes from the shared tokens to one of `starts` (B,), its own row."""
    ends = torch.cat([starts[1:], starts.new_tensor([cache.get_seq_length()])])
    slots = starts[:, None] + torch.arange(int((ends - starts).max()), device=starts.device)
    slots.clamp_(max=cache.get_seq_length() - 1)  # what follows a rollout is never seen
    slots = torch.cat([torch.arange(shared, device=starts.device).expand(len(starts), -1), slots], dim=1)
    for layer in cache.layers:
        index = slots.to(layer.keys.device)
        layer.keys = layer.keys[0][:, index].transpose(0, 1).contiguous()
        layer.values = layer.values[0][:, index].transpose(0, 1).contiguous()
