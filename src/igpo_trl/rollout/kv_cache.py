"""Prefix reuse in multi-turn generation: the KV cache of a batch of rollouts, kept from one turn to the next.

`generate` takes left-padded rows and a cache that holds the first slots of all of them. Between two turns the rows
grow by observations of different lengths, and some rollouts end. So before each turn the cached keys and values are
gathered again. Let W be the width of the new batch and N the largest number of tokens that a row must still run. A row
of length L then keeps its first L − N tokens, in the slots W − L to W − N:

    cache of the last turn              new batch, W = 9, N = 3
    slot  0  1  2  3  4  5  6           slot  0  1  2  3  4  5 | 6  7  8
    A     ·  ·  a1 a2 a3 a4 a5          A     ·  a1 a2 a3 a4 a5| a6 a7 a8
    B     b1 b2 b3 b4 b5 b6 b7          B     b1 b2 b3 b4 b5 b6| b7 b8 b9
    C     ·  c1 c2 c3 c4 c5 c6          (C has ended)
                                              gathered         | run

The result is a plain left-padded batch, the same that a generation without a cache would get. A row with fewer than N
new tokens runs some cached tokens again (b7) where it would otherwise run padding.

Within a turn, sampled tokens are written into room that each layer keeps for them. A `DynamicLayer` copies all of its
keys and values for every token.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..beliefs.branching import evaluating
from ..beliefs.models import ChangingPositions, adds_virtual_tokens, cache_argument


def reuse_obstacle(model: nn.Module, generation_config: Any) -> str | None:
    """The reason why the KV cache of this model cannot be kept between turns, `None` if it can."""
    if adds_virtual_tokens(model):
        return "prompt-learning adapters put virtual tokens into the cache"
    inner: Any = model
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    name = type(base).__name__
    if getattr(base, "_is_stateful", False) or not getattr(base, "_supports_default_dynamic_cache", lambda: True)():
        return f"{name} keeps a recurrent state, which cannot be cropped"
    layers = DynamicCache(config=base.config.get_text_config()).layers
    unsupported = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if unsupported or not layers:
        kinds = ", ".join(sorted(unsupported)) or "no known layers"
        return f"{name} has layers that do not keep every past token ({kinds})"
    if generation_config.cache_implementation not in (None, "dynamic"):
        return f"`cache_implementation={generation_config.cache_implementation!r}` is set"
    if generation_config.use_cache is False:
        return "`use_cache=False` is set"
    return None


class _RoomyLayer(DynamicLayer):
    """A layer with room for the next tokens, where sampling writes them. Without gradients."""

    ROOM = 64

    keys: Any
    values: Any
    _room: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values, with unused slots at the end
    _filled: torch.Tensor | None = None  # `keys` after the last update: something else if they were gathered since

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or self.keys is not self._filled or self._room[0].shape[-2] < end:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._room = self._grown(self.keys, key_states, end), self._grown(self.values, value_states, end)
        keys, values = self._room
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        self._filled = self.keys
        return self.keys, self.values

    def _grown(self, old: torch.Tensor, new: torch.Tensor, end: int) -> torch.Tensor:
        grown = new.new_empty(*new.shape[:-2], end + self.ROOM, new.shape[-1])
        if old.numel():
            grown[..., : old.shape[-2], :] = old
        return grown


def _empty_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() for _ in cache.layers]
    return cache


class PrefixCache:
    """
    Keys and values of the rollouts of one batch.

    Args:
        positions ([`ChangingPositions`], *optional*): position embeddings of the model that change for all tokens of a
            longer batch. What was cached with others than those that the next turn starts with is run again.
        share_prompts (`bool`, *optional*, defaults to `True`): run equal contexts of the first turn, which are the
            prompt of a group, once. Not for sharded models, because ranks would make different numbers of forwards.
        has_dropout (`bool`, *optional*, defaults to `True`): whether a model in training mode samples with dropout, as
            in TRL. Beliefs cannot be scored against such keys and values.
    """

    def __init__(
        self, positions: ChangingPositions | None = None, share_prompts: bool = True, has_dropout: bool = True
    ) -> None:
        self.has_dropout = has_dropout
        self._share_prompts = share_prompts and positions is None
        self._positions = positions
        self._longest = (0, 0)  # longest context of the cached rows, before and after the last turn
        self._cache: Any = None
        self._row_of: dict[int, int] = {}  # rollout → row of the cache
        self._tokens: list[torch.Tensor] = []  # tokens in the row's slots, without padding
        self._padding: torch.Tensor = torch.zeros(0, dtype=torch.long)  # left padding of each row

    def generate(
        self,
        generate: Callable[..., torch.Tensor],
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rollouts: Sequence[int],
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Return what `generate(input_ids=…, attention_mask=…)` returns, without running cached tokens again.

        Args:
            generate (`Callable`): The model's `generate`.
            model (`PreTrainedModel`): Whose method it is.
            input_ids (`torch.Tensor` of shape `(B, W)`): Left-padded contexts.
            attention_mask (`torch.Tensor` of shape `(B, W)`): 0 on padding.
            rollouts (`Sequence[int]`): The rollout that each row continues. A row whose tokens differ from the cached
                ones keeps the prefix that they share.
            kwargs: Passed on to `generate`.

        Returns:
            `torch.Tensor` of shape `(B, W + new tokens)`.
        """
        padding = (attention_mask.shape[1] - attention_mask.sum(dim=1)).tolist()
        rows = [ids[skip:].cpu() for ids, skip in zip(input_ids, padding, strict=True)]
        longest = max(map(len, rows))
        if self._positions is not None and not all(self._positions.share(longest, cached) for cached in self._longest):
            self._cache, self._row_of = None, {}
        # The last token always runs, because it predicts the first new one.
        to_run = max(
            len(row) - min(self._shared(rollout, row), len(row) - 1)
            for rollout, row in zip(rollouts, rows, strict=True)
        )
        if self._cache is None and self._share_prompts:
            self._cache = _prefill_once(model, input_ids, attention_mask)
        else:
            slots = input_ids.shape[1] - to_run
            self._cache = self._gather(model.config.get_text_config(), rollouts, padding, slots)
        kwargs[cache_argument(model)] = self._cache
        sequences = generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        length = self._cache.get_seq_length()  # the last sampled token was never run
        self._longest = (longest, length - min(padding))
        self._row_of = {rollout: row for row, rollout in enumerate(rollouts)}
        self._padding = torch.tensor(padding)
        self._tokens = [ids[skip:length].cpu() for ids, skip in zip(sequences, padding, strict=True)]
        return sequences

    def __contains__(self, rollout: int) -> bool:
        return rollout in self._row_of

    def cached_row(self, rollout: int, tokens: Sequence[int]) -> tuple[int, int, int]:
        """A rollout's row of the cache, its left padding, and the number of leading `tokens` that are cached."""
        row = self._row_of[rollout]
        cached = self._tokens[row].tolist()
        # Nearly always all of them are, and lists are compared faster than they become tensors.
        same = cached == list(tokens[: len(cached)])
        length = len(cached) if same else self._shared(rollout, torch.tensor(tokens))
        return row, int(self._padding[row]), length

    @property
    def has_long_rows(self) -> bool:
        """Whether a row has changed the position embeddings of all."""
        return self._positions is not None and max(self._longest) > self._positions.limit

    @property
    def cache(self) -> Any:
        """The `DynamicCache`, with one row per rollout."""
        return self._cache

    def _shared(self, rollout: int, row: torch.Tensor) -> int:
        """Number of leading tokens of the row that are cached."""
        if rollout not in self._row_of:
            return 0
        cached = self._tokens[self._row_of[rollout]]
        length = min(len(cached), len(row))
        differences = (cached[:length] != row[:length]).nonzero()
        return int(differences[0]) if len(differences) else length

    def _gather(self, config: Any, rollouts: Sequence[int], padding: Sequence[int], slots: int) -> Any:
        """Gather the first `slots` columns of the new batch from the cache."""
        if self._cache is None or slots <= 0 or self._cache.get_seq_length() == 0:  # some models use one of their own
            return _empty_cache(config)
        # These slots of a rollout that is not cached are masked padding, so any row will do.
        source = torch.tensor([self._row_of.get(rollout, 0) for rollout in rollouts])
        shift = self._padding[source] - torch.tensor(padding)
        column = (torch.arange(slots) + shift[:, None]).clamp(0, self._cache.get_seq_length() - 1)
        for layer in self._cache.layers:  # layer by layer, so that the old and the new cache never both exist
            rows, columns = source.to(layer.keys.device), column.to(layer.keys.device)
            layer.keys = layer.keys[rows[:, None], :, columns].transpose(1, 2).contiguous()
            layer.values = layer.values[rows[:, None], :, columns].transpose(1, 2).contiguous()
        return self._cache


@torch.no_grad()
def _prefill_once(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    """A cache of all tokens but the last, computed once for equal rows; an empty one if all rows differ."""
    cache = _empty_cache(model.config.get_text_config())
    rows = [tuple(row) for row in (input_ids * attention_mask - (attention_mask == 0).long()).tolist()]
    number = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    if len(number) == len(rows) or input_ids.shape[1] < 2:
        return cache
    first = torch.tensor([rows.index(row) for row in number], device=input_ids.device)
    mask = attention_mask[first, :-1]
    # Positions as `generate` counts them.
    position_ids = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
    model(
        input_ids=input_ids[first, :-1],
        attention_mask=mask,
        position_ids=position_ids,
        **{cache_argument(model): cache},
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_select_indices(torch.tensor([number[row] for row in rows], device=input_ids.device))
    return cache


@contextmanager
def replaced_generate(
    model: Any, cache: PrefixCache | None, rollouts: Sequence[int], max_new_tokens: int
) -> Iterator[None]:
    """
    Make the model's `generate` respect a limit and reuse a KV cache, for callers that have no argument for either.

    Args:
        model (`PreTrainedModel`): whose `generate` is replaced while the context lasts.
        cache ([`PrefixCache`], *optional*): of the rollouts.
        rollouts (list of `int`): the rollout that each row continues; the cache is left alone if rows do not match.
        max_new_tokens (`int`): upper bound of the new tokens.
    """
    generate, instance_attribute = model.generate, vars(model).get("generate")  # FSDP2 sets one on the instance

    def generate_with_cache(input_ids: Any, attention_mask: Any, generation_config: Any, **options: Any) -> Any:
        config = copy.copy(generation_config)
        if config.max_new_tokens is not None:
            config.max_new_tokens = min(config.max_new_tokens, max_new_tokens)
        options["generation_config"] = config
        if cache is None or len(rollouts) != len(input_ids):
            return generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        with nullcontext() if cache.has_dropout else evaluating(model):
            return cache.generate(generate, model, input_ids, attention_mask, rollouts, **options)

    model.generate = generate_with_cache
    try:
        yield
    finally:
        if instance_attribute is None:
            del model.generate
        else:
            model.generate = instance_attribute
