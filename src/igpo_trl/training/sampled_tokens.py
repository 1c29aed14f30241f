"""Forwards of the loss without padding and without observations: what no loss reads is not computed.

TRL pads every row on both sides to the longest prompt and the longest completion of the generation batch, and runs the
output head on every token of the completion. Here the real tokens of a microbatch are one row, in which every rollout
attends to itself alone, and the head runs on the hidden states before sampled tokens:

    TRL         · · p p s s o o s s · ·        packed     p p s s o o s s p p p p s s s
                p p p p s s s · · · · ·        head         x x     x x         x x x

FlashAttention knows packed rows; PyTorch's attention learns them from this module. It also learns to let all rollouts
read the tokens with which all of them begin, such as the prompt of their group, from one copy. With another attention,
and for models that have not been tested with packed rows, a microbatch has rows that begin at the left and end with
the longest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, has_compiled_regions, is_compiled_module
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..beliefs.models import adds_virtual_tokens, base_model, packed_obstacle


class SampledTokensModel:
    """
    A model with TRL's fused output head that is run on real tokens, and whose head is run on sampled tokens alone.

    Results have the shape that TRL expects, with 0 at all other tokens, which TRL's loss and metrics mask. Positions
    count from a row's first token instead of from its padding, which changes rotary embeddings by rounding only.

    Args:
        model (`Callable`): what TRL calls: the model, or a wrapper around it.
        backbone (`nn.Module`): the part of the model whose output the head reads.
        sampled_mask (`torch.Tensor` of shape (B, T)): 1 on completion tokens whose log-probabilities are wanted. Calls
            take its rows in order.
        packs (`bool`, *optional*, defaults to `False`): put all rows into one, see [`can_pack`].
    """

    def __init__(self, model: Any, backbone: nn.Module, sampled_mask: torch.Tensor, *, packs: bool = False):
        self._model = model
        self._backbone = backbone
        self._sampled_mask = sampled_mask.bool()
        self._packs = packs
        self._num_rows = 0
        #: Tokens that have been computed, with padding.
        self.num_computed = 0
        #: Tokens that the output head has been run on.
        self.num_scored = 0

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **inputs: Any
    ) -> Any:
        size, width = input_ids.shape
        sampled = self._sampled_mask[self._num_rows : self._num_rows + size]
        self._num_rows += size
        is_real, padding = attention_mask.bool(), attention_mask.argmax(dim=1)
        position = attention_mask.cumsum(dim=1) - 1
        is_scored = nn.functional.pad(sampled, (width - sampled.shape[1], 0)) & is_real
        if empty := not is_scored.any():
            is_scored[0, padding[0] + 1] = True  # the output stays connected to the model
        row, column = is_scored.nonzero(as_tuple=True)
        before = position[row, column] - 1  # whose hidden state scores the token
        lengths = attention_mask.sum(dim=1)
        slot = torch.arange(int(lengths.max()), device=input_ids.device)
        mask = slot < lengths[:, None]
        ids = input_ids.gather(1, (padding[:, None] + slot).clamp(max=width - 1)).masked_fill(~mask, 0)
        if self._packs:
            shared = _shared_tokens(self._backbone, ids, lengths)
            mask[1:, :shared] = False
            rest = lengths - shared
            in_rest = before + (rest.cumsum(dim=0) - rest)[row]
            place = (torch.zeros_like(row), torch.where(before < shared, before, in_rest))
            ids, positions = ids[mask][None], slot.expand(size, -1)[mask][None]
            inputs |= _packed_inputs(self._backbone, positions, shared, rest)
        else:
            inputs["attention_mask"] = mask.to(attention_mask.dtype)
            place = (row, before)
        self.num_computed += ids.numel()
        self.num_scored += len(row)
        with _hidden_states_at(self._backbone, *place):
            output = self._model(input_ids=ids, shift_labels=input_ids[row, column][None], **inputs)
        for name in ("log_probs", "entropy"):
            if (values := getattr(output, name)) is not None:
                values = values[0] * 0.0 if empty else values[0]
                output[name] = values.new_zeros(size, width - 1).index_put((row, column - 1), values)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def _hidden_states_at(backbone: nn.Module, row: torch.Tensor, column: torch.Tensor) -> Iterator[None]:
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


def _shared_tokens(backbone: Any, ids: torch.Tensor, lengths: torch.Tensor) -> int:
    """
    How many tokens all rows (B, L) begin with, of which one copy is enough.

    None where attention cannot share them, where dropout would be shared too, and where a router counts its tokens.
    """
    config = backbone.config
    if len(ids) == 1 or config._attn_implementation != "sdpa" or getattr(config, "output_router_logits", False):
        return 0
    if backbone.training and any(isinstance(module, nn.Dropout) and module.p for module in backbone.modules()):
        return 0
    equal = (ids == ids[:1]).all(dim=0).long().cumprod(dim=0).sum()
    return int(torch.minimum(equal, lengths.min() - 1))  # each row keeps a token of its own


def _packed_inputs(backbone: Any, position_ids: torch.Tensor, shared: int, lengths: torch.Tensor) -> dict[str, Any]:
    """Arguments that make a backbone take one row (1, N): the shared tokens, and then each row's rest (B,)."""
    # A mask without padding is dropped. Without any, one of N × N would be made from the positions.
    inputs = {"position_ids": position_ids, "attention_mask": torch.ones_like(position_ids)}
    if backbone.config._attn_implementation == "sdpa":
        _teach_sdpa()
        return inputs | {"packed_lengths": (shared, *lengths.tolist())}
    ends = nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return inputs | {
        "attention_mask": None,
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def can_pack(model: Any) -> bool:
    """Whether a model takes several rollouts in one row: one of the tested classes, with an attention that can."""
    config = base_model(model).config
    if packed_obstacle(model, 0) is not None or config.model_type in _DROP_OPTIONS:
        return False
    attention = config._attn_implementation
    return attention == "sdpa" or "flash" in attention


# transformers model types with attention classes of their own, which would not pass on the lengths.
_DROP_OPTIONS = {"nemotron", "stablelm"}


def _teach_sdpa() -> None:
    """Make PyTorch's attention take packed rows, as FlashAttention does; its calls for other rows stay as they are."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(attend, "func", None) is not _packed_sdpa:
        AttentionInterface.register("sdpa", partial(_packed_sdpa, attend))


def _packed_sdpa(
    attend: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    if packed_lengths is None:
        return attend(module, query, key, value, attention_mask, **options)
    first = packed_lengths[0]
    shared, *rests = zip(*(states.split(packed_lengths, dim=2) for states in (query, key, value)), strict=True)
    window = options.get("sliding_window")
    # Causal attention skips what lies above the diagonal but takes as many queries as keys, so that what the shared
    # tokens see is computed again with every row. Attention with a mask pays off where they are more than a row's own.
    apart = first > max(packed_lengths[1:])
    outputs: list[torch.Tensor] = []
    if apart:
        outputs = [attend(module, *shared, _mask(first, 0, window, query), **options)[0]]
    for rest in rests:
        row = [torch.cat(part, dim=2) for part in zip(shared, rest, strict=True)] if first else rest
        if apart:
            mask = _mask(row[1].shape[2], first, window, query)
            output = attend(module, rest[0], *row[1:], mask, **options)[0]
        else:
            output = attend(module, *row, _mask(row[0].shape[2], 0, window, query), **options)[0]
            output = output[:, first:] if outputs else output
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _mask(length: int, first: int, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
    """What a rollout's tokens from number `first` on see, (1, 1, length − first, length); `None`: all before them."""
    if not first and (window is None or length <= window):
        return None
    mask = torch.ones(length - first, length, dtype=torch.bool, device=query.device).tril(first)
    return mask[None, None] if window is None else mask.triu(first + 1 - window)[None, None]


def backbone_of(model: Any) -> nn.Module | None:
    """
    What the output head of a model reads, through wrappers and adapters.

    `None` if its rows get virtual tokens, or if it is compiled: a compiled forward leaves hooks out, and would be
    compiled anew for every length.
    """
    if is_compiled_module(model) or has_compiled_regions(model):
        return None
    inner = extract_model_from_parallel(model)
    if adds_virtual_tokens(inner):
        return None
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return inner.base_model


def sampled_mask_of(inputs: dict[str, Any]) -> torch.Tensor:
    """1 on the sampled tokens of a microbatch of TRL, of shape (B, T)."""
    return torch.as_tensor(inputs["completion_mask"] * inputs.get("tool_mask", 1))
