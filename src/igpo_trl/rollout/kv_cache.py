"""Prefix reuse in multi-turn generation: the KV cache of a batch of rollouts, kept from one turn to the next.

`generate` takes left-padded rows, and a cache that holds the first slots of all of them. At the next turn the rows
have grown by observations of different lengths, some are gone, and of some the last tokens are not wanted. So before
each turn the cached keys and values are gathered anew for the rows that go on: with W the width of the new batch and N
the largest number of tokens that a row still has to run, a row of length L keeps its first L − N tokens, in the slots
W − L to W − N. The batch stays a plain left-padded one, exactly that which a generation without a cache would get,
and a row with fewer than N new tokens runs some cached ones again where it would else run padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def reuse_obstacle(model: nn.Module, generation_config: Any) -> str | None:
    """Why the KV cache of this model cannot be kept between turns, or `None` where it can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "prompt-learning adapters put tokens of their own into the cache"
    inner: Any = model
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    name = type(base).__name__
    if getattr(base, "_is_stateful", False) or not getattr(base, "_supports_default_dynamic_cache", lambda: True)():
        return f"{name} keeps a recurrent state, which cannot be cut back"
    layers = DynamicCache(config=base.config.get_text_config()).layers
    odd = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if odd or not layers:
        return f"{name} has layers that do not keep every past token ({', '.join(sorted(odd)) or 'no layers known'})"
    if generation_config.cache_implementation not in (None, "dynamic"):
        return f"`cache_implementation={generation_config.cache_implementation!r}` is asked for"
    if generation_config.use_cache is False:
        return "`use_cache=False` is asked for"
    return None


class PrefixCache:
    """Keys and values of the rollouts of one batch; dropped with the object."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._row_of: dict[int, int] = {}  # rollout → row of the cache
        self._tokens: list[torch.Tensor] = []  # what the row's slots hold, padding left out
        self._padding: torch.Tensor = torch.zeros(0, dtype=torch.long)  # left padding of each row

    def generate(
        self,
        generate: Callable[..., torch.Tensor],
        config: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rollouts: Sequence[int],
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        What `generate(input_ids=…, attention_mask=…)` returns, without running again what the cache holds.

        Args:
            generate (`Callable`): the model's `generate`.
            config (`PretrainedConfig`): text configuration of the model.
            input_ids (`torch.Tensor` of shape (B, W)): left-padded.
            attention_mask (`torch.Tensor` of shape (B, W)): 0 on padding.
            rollouts (list of `int`): which rollout each row continues. A row whose tokens differ from the cached ones
                keeps the part that they share.
            kwargs: passed on to `generate`.

        Returns:
            `torch.Tensor` of shape (B, W + new tokens).
        """
        padding = (attention_mask.shape[1] - attention_mask.sum(dim=1)).tolist()
        rows = [ids[skip:].cpu() for ids, skip in zip(input_ids, padding, strict=True)]
        # At least the last token is run: it predicts the first new one.
        to_run = max(
            len(row) - min(self._shared(rollout, row), len(row) - 1)
            for rollout, row in zip(rollouts, rows, strict=True)
        )
        self._cache = self._gather(config, rollouts, padding, input_ids.shape[1] - to_run)
        sequences = generate(input_ids=input_ids, attention_mask=attention_mask, past_key_values=self._cache, **kwargs)
        held = self._cache.get_seq_length()  # the last sampled token was never run
        self._row_of = {rollout: row for row, rollout in enumerate(rollouts)}
        self._padding = torch.tensor(padding)
        self._tokens = [ids[skip:held].cpu() for ids, skip in zip(sequences, padding, strict=True)]
        return sequences

    def __contains__(self, rollout: int) -> bool:
        return rollout in self._row_of

    def cached_row(self, rollout: int, tokens: Sequence[int]) -> tuple[int, int, int]:
        """The cache's row of a rollout, its left padding, and how many of these first tokens it holds."""
        row = self._row_of[rollout]
        return row, int(self._padding[row]), self._shared(rollout, torch.tensor(tokens))

    @property
    def cache(self) -> Any:
        """The cache itself, a `DynamicCache` with a row for each rollout."""
        return self._cache

    def _shared(self, rollout: int, row: torch.Tensor) -> int:
        """Number of tokens at the beginning of the row that the cache holds."""
        if rollout not in self._row_of:
            return 0
        held = self._tokens[self._row_of[rollout]]
        length = min(len(held), len(row))
        differ = (held[:length] != row[:length]).nonzero()
        return int(differ[0]) if len(differ) else length

    def _gather(self, config: Any, rollouts: Sequence[int], padding: Sequence[int], slots: int) -> Any:
        """Cache of these rows whose first `slots` columns are those of the new batch."""
        from transformers import DynamicCache

        if self._cache is None or slots <= 0:
            return DynamicCache(config=config)
        # A rollout that is not cached has nothing but padding in these slots, which is masked: any row does.
        source = torch.tensor([self._row_of.get(rollout, 0) for rollout in rollouts])
        shift = self._padding[source] - torch.tensor(padding)
        column = (torch.arange(slots) + shift[:, None]).clamp(0, self._cache.get_seq_length() - 1)
        for layer in self._cache.layers:  # one layer at a time, so that the old and the new cache never both exist
            rows, columns = source.to(layer.keys.device), column.to(layer.keys.device)
            layer.keys = layer.keys[rows[:, None], :, columns].transpose(1, 2).contiguous()
            layer.values = layer.values[rows[:, None], :, columns].transpose(1, 2).contiguous()
        return self._cache
