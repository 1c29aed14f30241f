"""
When beliefs are scored, and against whose keys and values.

Scoring needs the keys and values of a rollout and then runs the probes alone, so it is done where those are there
anyway: against the KV cache of the rollout itself, when a rollout leaves its batch; against those of the forward that
gives the old per-token log-probabilities, where TRL needs these; and only for what is then left, against those of a
forward of its own. A score is kept by its context and probe, so nothing is scored twice, and a wrong guess about what
will be asked for costs time, never a wrong value.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..config import IGPOConfig
from ..turns import gain_spans
from . import (
    CachedContexts,
    build_probes,
    cached_obstacle,
    check_beliefs,
    packed_obstacle,
    reduce_aliases,
    score_beliefs,
)
from .scoring import AliasReduction, rounding_error

logger = logging.getLogger(__name__)

Aliases = tuple[str, ...]


class BeliefPass:
    """
    The belief passes of one trainer.

    Args:
        args ([`IGPOConfig`]): configuration.
        tokenizer: makes the probes' tokens.
        template (`str`): text with the answer's slot, fitted to the generation prompt.
        most_of_all_processes (`Callable`): the maximum over processes of a number.
    """

    def __init__(
        self,
        args: IGPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        most_of_all_processes: Callable[[int], int],
    ):
        self._args = args
        self._tokenizer = tokenizer
        self._template = template
        self._most_of_all_processes = most_of_all_processes
        self._method: Any = None  # until "auto" has been compared with plain forwards, on the first batch
        self._trusts_held = True
        self._checked_held = args.belief_method == "packed"
        self._answers: Sequence[Aliases] = ()
        self._every_turn = False
        self._probes_of: dict[Aliases, list[Any]] = {}
        self._memo: dict[Hashable, float] = {}

    def begin(self, answers: Sequence[Aliases], *, every_turn: bool = False) -> None:
        """
        Start a batch.

        Args:
            answers: the aliases of each rollout's answer; empty if nothing is to be scored.
            every_turn: whether to score the belief before every turn, whether or not a gain needs it.
        """
        self._answers, self._memo, self._every_turn = answers, {}, every_turn
        self._probes_of = {
            aliases: build_probes(self._tokenizer, aliases, self._template, self._args.max_answer_tokens)
            for aliases in set(answers)
        }

    def turns_to_score(self, num_turns: int, called: Sequence[Any]) -> list[int]:
        """The turns of a rollout before which the belief is needed."""
        args = self._args
        if self._every_turn or args.normalization == "critic":
            return list(range(num_turns))
        spans = gain_spans(num_turns, called, every=args.info_gain_every, tools=args.info_gain_tools)
        # The first and the last belief are shown wherever there is any.
        return sorted({turn for span in spans for turn in span} | {0, num_turns - 1}) if spans else []

    def can_use_held(self, model: nn.Module, longest: int, offset: bool = False) -> bool:
        """Whether the keys and values of another forward of this model may be used, and there is a use for them."""
        if not self._answers or not self._trusts_held or "per_turn" in (self._method, self._args.belief_method):
            return False
        return packed_obstacle(model, longest) is None and cached_obstacle(model, offset) is None

    def score_held(
        self,
        model: nn.Module,
        cached: CachedContexts,
        rollouts: Sequence[int],
        sequences: Sequence[Sequence[int]],
        boundaries: Sequence[Sequence[int]],
        *,
        in_step: bool = False,
    ) -> None:
        """
        Score these rollouts against keys and values that are there.

        Args:
            model: what they were made by, with the weights that it had.
            cached: keys and values, in the order of `rollouts`.
            rollouts: numbers of the rollouts in this process's batch.
            sequences, boundaries: as for [`score_beliefs`].
            in_step: whether every process calls this, as often, and must make the same number of forwards.
        """
        score_beliefs(
            model,
            sequences,
            boundaries,
            [self._probes_of[self._answers[i]] for i in rollouts],
            tokens_per_batch=self._args.belief_tokens_per_batch,
            synchronize=self._most_of_all_processes if in_step else None,
            cached=cached,
            memo=self._memo,
        )

    def score(
        self, model: nn.Module, sequences: Sequence[Sequence[int]], boundaries: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Log-beliefs of each rollout of the batch at its boundaries, a tensor for each; every process calls this."""
        args = self._args
        rollouts = (sequences, boundaries, [self._probes_of[aliases] for aliases in self._answers])
        if self._method is None:
            refused = args.belief_method == "auto" and check_beliefs(
                model, *rollouts, synchronize=self._most_of_all_processes
            )
            self._method = "per_turn" if refused else args.belief_method
        found, memo = len(self._memo), self._memo
        if not self._checked_held and self._most_of_all_processes(found):
            memo = {}  # scored anew this once, and compared
        log_probs = score_beliefs(
            model,
            *rollouts,
            method=self._method,
            tokens_per_batch=args.belief_tokens_per_batch,
            synchronize=self._most_of_all_processes,
            memo=memo,
        )
        if memo is not self._memo:
            self._compare(model, memo)
        self._memo = {}
        return [
            reduce_aliases(values, cast(AliasReduction, args.alias_reduction)) if len(values) else values.new_zeros(0)
            for values in log_probs
        ]

    def _compare(self, model: nn.Module, anew: dict[Hashable, float]) -> None:
        """Whether scores against keys and values of other forwards are those that a forward of its own gives."""
        self._checked_held = True
        apart = max(
            (abs(value - anew[key]) / max(1.0, abs(anew[key])) for key, value in self._memo.items() if key in anew),
            default=0.0,
        )
        wrong = not apart <= (allowed := rounding_error(model))  # NaN is
        if self._most_of_all_processes(int(wrong)):
            self._trusts_held = False
            logger.warning(
                "Beliefs are scored by forwards of their own: against the keys and values of the rollout they are "
                "%.2g nats apart%s, where rounding explains %.2g. Please report this model.",
                apart,
                "" if wrong else " here, and more on another process",
                allowed,
            )


class _Cache(DynamicCache):
    """A class of its own: FSDP2 takes what it knows as a container apart and hands the model a copy."""


class KeepsKeysAndValues:
    """
    A model that shows the keys and values of each forward; everything else is the model's own.

    Args:
        model: what is called.
        show (`Callable`): gets the cache of a forward, the number of rows before it, and the number of its own.
    """

    def __init__(self, model: Any, show: Callable[[DynamicCache, int, int], None]):
        self._model = model
        self._show = show
        self._rows = 0

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        cache = _Cache()  # without a config: layers with a window would drop tokens
        output = self._model(input_ids=input_ids, past_key_values=cache, **inputs)
        if cache.get_seq_length() == input_ids.shape[1]:  # else the model kept none without being asked for it
            self._show(cache, self._rows, len(input_ids))
        self._rows += len(input_ids)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
