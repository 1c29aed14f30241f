"""Forwards of the loss without padding and without observations: what no loss reads is not computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel


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
    """Make the next forward of the backbone return the hidden states at these positions, as one row."""

    def select(module: Any, arguments: Any, output: Any) -> Any:
        handle.remove()  # what wraps the model may run further forwards: beliefs against the KV cache of this one
        output.last_hidden_state = output.last_hidden_state[row, column][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def backbone_of(model: Any) -> torch.nn.Module | None:
    """What the output head of a model reads, through wrappers and adapters; `None` if its rows get virtual tokens."""
    inner = extract_model_from_parallel(model)
    if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
        return None
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return inner.base_model


def sampled_mask_of(inputs: dict[str, Any]) -> torch.Tensor:
    """1 on the sampled tokens of a microbatch of TRL, of shape (B, T)."""
    return torch.as_tensor(inputs["completion_mask"] * inputs.get("tool_mask", 1))


def exchanges_rollouts(args: Any) -> bool:
    """Whether microbatches are formed by length: only if the loss does not depend on which rollouts share one."""
    # `bnpo`, the threshold of the entropy and the entropy bonus are each of one microbatch.
    uses_entropy = args.top_entropy_quantile < 1.0 or args.entropy_coef or args.use_adaptive_entropy
    return not (args.pad_to_longest or args.loss_type == "bnpo" or uses_entropy)


def by_length(batches: list[dict[str, Any]], accumulation: int) -> list[dict[str, Any]]:
    """
    Exchange rollouts between the microbatches of one optimizer step, so that each holds rollouts of like length.

    Args:
        batches (list of `dict`): microbatches of equal size, as TRL makes them: values with one entry per rollout,
            numbers, or `None`.
        accumulation (`int`): microbatches of an optimizer step. The loss must be a sum or mean over their rollouts.
    """
    result = []
    for first in range(0, len(batches), accumulation):
        window = batches[first : first + accumulation]
        lengths = torch.cat([batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) for batch in window])
        order = lengths.argsort(descending=True)
        result += [{name: _rows(name, window, rows) for name in window[0]} for rows in order.chunk(len(window))]
    return result


def _rows(name: str, batches: list[dict[str, Any]], rows: torch.Tensor) -> Any:
    values = [batch[name] for batch in batches]
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)[rows.to(values[0].device)] if values[0].ndim else values[0]
    if isinstance(values[0], list):
        flat = [value for part in values for value in part]
        return [flat[row] for row in rows.tolist()]
    return values[0]
