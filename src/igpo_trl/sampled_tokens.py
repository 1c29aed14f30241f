"""Forwards of the loss without padding and without observations: what no loss reads is not computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SampledTokensModel:
    """
    A model with TRL's fused output head that is run on real tokens, and whose head is run on sampled tokens alone.

    TRL pads every row on both sides to the longest prompt and the longest completion of the generation batch, and
    scores every token of the completion. This moves the rows to the left, cuts the columns that are padding in all of
    them, and hands the head the hidden states before sampled tokens. Results have the shape that TRL expects, with 0
    at all other tokens, which TRL's loss and metrics mask. Rotary positions count from a row's first token instead of
    from its padding, which changes rounding only.

    Args:
        model (`Callable`): what TRL calls: the model, or a wrapper around it.
        backbone (`nn.Module`): the part of the model whose output the head reads.
        sampled_mask (`torch.Tensor` of shape (B, T)): 1 on completion tokens whose log-probabilities are wanted. Calls
            take its rows in order.
    """

    def __init__(self, model: Any, backbone: torch.nn.Module, sampled_mask: torch.Tensor):
        self._model = model
        self._backbone = backbone
        self._sampled_mask = sampled_mask.bool()
        self._num_rows = 0

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **inputs: Any
    ) -> Any:
        size, width = input_ids.shape
        sampled = self._sampled_mask[self._num_rows : self._num_rows + size]
        self._num_rows += size
        lengths, padding = attention_mask.sum(dim=1), attention_mask.argmax(dim=1)
        position = torch.arange(int(lengths.max()), device=input_ids.device)
        column = (padding[:, None] + position).clamp(max=width - 1)
        is_real = position < lengths[:, None]
        wanted = torch.nn.functional.pad(sampled, (width - sampled.shape[1], 0)).gather(1, column) & is_real
        is_scored = wanted[:, 1:]  # the hidden state before a token scores it
        if empty := not is_scored.any():
            is_scored[0, 0] = True  # the output stays connected to the model
        ids = input_ids.gather(1, column)
        row, before = is_scored.nonzero(as_tuple=True)
        with _hidden_states_at(self._backbone, row, before):
            output = self._model(
                input_ids=ids.where(is_real, ids.new_zeros(())),
                attention_mask=is_real.to(attention_mask.dtype),
                shift_labels=ids[:, 1:][is_scored][None],
                **inputs,
            )
        place = (row, before + padding[row])
        for name in ("log_probs", "entropy"):
            if (values := getattr(output, name)) is not None:
                values = values[0] * 0.0 if empty else values[0]
                output[name] = values.new_zeros(size, width - 1).index_put(place, values)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def _hidden_states_at(backbone: torch.nn.Module, row: torch.Tensor, column: torch.Tensor) -> Iterator[None]:
    """Make the backbone return the hidden states at these positions, as one row."""

    def select(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[row, column][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
