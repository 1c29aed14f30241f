"""Running a causal language model once and branching off its KV cache.

A trunk of tokens runs causally, and its keys and values are kept. Branches are short runs of tokens that leave the
trunk at different places. They run together in one forward, where each sees the trunk up to its limit, and itself:

    position    0  1  2  3  4  5  6  7        mask of that forward
    trunk       c0 c1 c2 c3 c4 c5 c6 c7            c0 c1 c2 c3 c4 c5   a3 a4 b6 b7
                      │        │              a3   x  x  x             x
    branch a          └─ a3 a4 │              a4   x  x  x             x  x
    branch b                   └─ b6 b7       b6   x  x  x  x  x  x          x
                                              b7   x  x  x  x  x  x          x  x
    a has limit 3, b has limit 6

No branch sees c6 and c7, so the forward leaves them out, as it does with what is padding in all rows. Positions are
those that a branch would have in a sequence by itself. Masks are computed from positions and not from slots of the
cache, so sliding windows are correct.

The functions take models without a `packed_obstacle`, and return the mean log-probabilities of targets.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from .models import LAYERED, adds_virtual_tokens, base_model, cache_argument, layer_kinds, parameters_of
from .packing import Forest, PlainBatch, Target, grow

__all__ = ["REARRANGES", "Trunk", "evaluating", "run_branches", "run_rows", "run_trunk"]

# The attribute of linear layers of 4 bits that says so. What bitsandbytes then computes with them has no gradient, and
# they stay rearranged in train mode.
REARRANGES = "support_avx512bf16_for_cpu"

# Rows of logits converted to float32 at a time: about 150 MB for a vocabulary of 150k tokens.
_LOGIT_ROWS = 256


class Trunk(DynamicCache):
    """
    Every key and value of the trunk in every layer, whatever the layer's window.

    Once the trunk is complete, tokens that run against it see the slots `seen` of the rows `rows` and each other, and
    are not added to it.

    Attributes:
        rows (`list[int]`): Rows of the cache.
        padding (`Sequence[int]`): Slots before the first token of each row.
        offset (`Sequence[int]`): Position of the first token of each row.
    """

    def __init__(self, num_layers: int, padding: Sequence[int], offset: Sequence[int], *, stop: bool = False) -> None:
        super().__init__()  # without a config: layers with a window would drop tokens that earlier branches see
        self.padding, self.offset = padding, offset
        self._last_layer = num_layers - 1
        self._stop = stop
        self._picked: torch.Tensor | None = None
        self.rows = list(range(len(padding)))
        self.complete = False
        self.seen = slice(0)

    @classmethod
    def of_rows(
        cls, cache: DynamicCache, rows: Sequence[int], padding: Sequence[int], offset: Sequence[int]
    ) -> "Trunk":
        """Some rows of a cache that another forward has filled. Layers are copied only while they are used."""
        trunk = cls(len(cache.layers), padding, offset)
        trunk.layers = cache.layers
        trunk.rows = list(rows)
        trunk.complete = True
        return trunk

    def see(self, rows: Sequence[int], seen: slice) -> None:
        """Let the next tokens see these slots of these of the trunk's rows."""
        picked, self.seen, self._picked = [self.rows[row] for row in rows], seen, None
        if picked != list(range(self.layers[0].keys.shape[0])):
            self._picked = torch.tensor(picked)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.complete:
            layer = self.layers[layer_idx]
            return self._followed_by(layer.keys, key_states), self._followed_by(layer.values, value_states)
        keys_and_values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._stop and layer_idx == self._last_layer:
            raise _Complete
        return keys_and_values

    def _followed_by(self, of_trunk: torch.Tensor, of_branches: torch.Tensor) -> torch.Tensor:
        of_trunk = of_trunk[:, :, self.seen]
        if self._picked is not None:
            of_trunk = of_trunk.index_select(0, self._picked.to(of_trunk.device))
        # Under autocast, cached and new keys can differ in dtype.
        return torch.cat([of_trunk.to(of_branches.dtype), of_branches], dim=-2)


class _Complete(Exception):
    """Ends a forward when the last layer's keys and values are known; the rest of it is not needed."""


def run_trunk(model: nn.Module, contexts: Sequence[Sequence[int]]) -> Trunk:
    """Run contexts causally, one per row, and keep their keys and values."""
    input_ids = torch.tensor(_padded(contexts), device=_device(model))
    start = [0] * len(contexts)
    trunk = Trunk(base_model(model).config.num_hidden_layers, start, start, stop=_may_stop(model))
    try:
        # No mask: causal attention never sees padding on the right, and the plain causal kernel is the fastest.
        model(input_ids=input_ids, use_cache=True, **{cache_argument(model): trunk}, **_options(model, [0]))
    except _Complete:
        pass
    trunk.complete = True
    return trunk


def run_branches(model: nn.Module, trunk: Trunk, rows: Sequence[Sequence[Target]]) -> list[float]:
    """Mean log-probability of the labels of each target in turn. `rows[i]` are the targets that leave row i."""
    device = _device(model)
    used = [row for row, targets in enumerate(rows) if targets]
    forests = [grow(rows[row]) for row in used]
    padding = [trunk.padding[row] for row in used]
    width = max(forest.num_predicting for forest in forests)
    first = min(padding)
    # No branch sees earlier or later tokens.
    trunk.see(used, slice(first, max(pad + max(forest.limits) for pad, forest in zip(padding, forests, strict=True))))
    nodes = _Nodes.of(forests, [pad - first for pad in padding], device)
    total = nodes.tokens.shape[1]
    offset = torch.tensor([trunk.offset[row] for row in used], device=device) - nodes.begin
    with _masked_attention(base_model(model)) as kind:
        logits = model(
            input_ids=nodes.tokens,
            position_ids=nodes.positions + offset[:, None],
            attention_mask=_masks(base_model(model).config, nodes, trunk.seen.stop - first, kind),
            **{cache_argument(model): trunk},
            use_cache=True,
            **_options(model, range(total - width, total)),
        ).logits[:, -width:]
    index = [
        (row + 1) * width - forest.num_predicting + read for row, forest in enumerate(forests) for read in forest.reads
    ]
    return _mean_log_probs(logits.flatten(0, 1), index, [target for targets in rows for target in targets])


def run_rows(model: nn.Module, batch: PlainBatch) -> list[float]:
    """Mean log-probability of the labels of each target, from one right-padded row per target."""
    device = _device(model)
    input_ids = torch.tensor(_padded(batch.rows), device=device)
    lengths = torch.tensor([len(row) for row in batch.rows], device=device)
    mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
    columns = batch.columns
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **_options(model, columns)).logits
    if logits.shape[1] != len(columns):
        logits = logits[:, -input_ids.shape[1] :][:, columns]  # virtual tokens come first
    place = {column: i for i, column in enumerate(columns)}
    index = [row * len(columns) + place[column] for row in range(len(batch.rows)) for column in batch.reads(row)]
    return _mean_log_probs(logits.flatten(0, 1), index, batch.targets)


class _Nodes(NamedTuple):
    """
    The forests of R rows as tensors (R, W), padded on the left.

    The nodes p that predict a label are then the last columns of all rows, and one slice of the hidden states goes
    through the LM head:

        row 0    n n p p p p
        row 1    · · · n p p

    Positions and limits are slots of the trunk. `begin` (R,) is the slot of each row's first token.
    """

    begin: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    limits: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, forests: Sequence[Forest], padding: Sequence[int], device: torch.device) -> "_Nodes":
        # With first = -1 and last = 0, only padding sees padding, and no row of the softmax is empty.
        padded = torch.tensor(
            [
                _padded([getattr(forest, name) for forest in forests], value, left=True)
                for name, value in (("tokens", 0), ("positions", 0), ("limits", 0), ("first", -1), ("last", 0))
            ],
            device=device,
        )
        begin = torch.tensor(padding, device=device)
        tokens, positions, limits, first, last = padded
        return cls(begin, tokens, positions + begin[:, None], limits + begin[:, None], first, last)


def _masks(config: Any, nodes: _Nodes, trunk_length: int, attention: str) -> Any:
    """Mask (R, 1, W, T + W) of the trunk and the nodes, or a dict with one for each layer kind."""
    place = torch.arange(trunk_length, device=nodes.tokens.device)
    of_trunk = (place >= nodes.begin[:, None, None]) & (place < nodes.limits[:, :, None])
    first = nodes.first[:, :, None]
    of_nodes = (nodes.first[:, None, :] <= first) & (first < nodes.last[:, None, :])
    visible = torch.cat([of_trunk, of_nodes], dim=-1)
    masks = {}
    for kind in layer_kinds(config):
        mask = visible
        if kind == "sliding_attention":
            keys = torch.cat([place.expand(len(nodes.tokens), -1), nodes.positions], dim=-1)
            mask = visible & (keys[:, None, :] > (nodes.positions - config.sliding_window)[:, :, None])
        if attention == "eager":  # it adds the mask to the scores, and float32 promotes them
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
        masks[kind] = mask[:, None]
    return masks if config.model_type in LAYERED else masks.popitem()[1]


@contextmanager
def _masked_attention(base: Any) -> Iterator[str]:
    """Switch to an attention that takes any mask, and back: SDPA, or eager for what SDPA does not support."""
    own = base.config._attn_implementation
    config = base.config.get_text_config()
    plain = getattr(base, "_supports_sdpa", True) and not getattr(config, "attn_logit_softcapping", None)
    masked = "sdpa" if plain and own != "eager" else "eager"
    if masked != own:
        base.set_attn_implementation(masked)  # a name in the config, read at each call: weights are not touched
    try:
        yield masked
    finally:
        if masked != own:
            base.set_attn_implementation(own)


def _may_stop(model: nn.Module) -> bool:
    """Whether a forward may be aborted: not if FSDP, DeepSpeed, offloading or a compiler waits for its end."""
    for module in model.modules():
        if next(module.children(), None) is None:
            continue  # a leaf has ended or not started when the last layer's keys are known
        hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        wrapper = isinstance(getattr(module, "module", None), nn.Module)
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if hooked or wrapper or compiled:
            return False
    return True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Turn dropout off, and restore the mode of every module: some may be frozen in eval mode on purpose.

    Linear layers of 4 bits stay in train mode where bitsandbytes would rearrange their weights in eval mode.
    """
    training = [module for module in model.modules() if module.training and not getattr(module, REARRANGES, False)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _options(model: nn.Module, columns: Sequence[int]) -> dict[str, Any]:
    """Arguments for logits at these columns only and without those of a router, if the model accepts them."""
    accepted = parameters_of(type(base_model(model)).forward)
    options: dict[str, Any] = {"output_router_logits": False}
    if not adds_virtual_tokens(model):
        options["logits_to_keep"] = torch.tensor(columns, device=_device(model))
    return {name: value for name, value in options.items() if name in accepted}


def _mean_log_probs(logits: torch.Tensor, index: list[int], targets: Sequence[Target]) -> list[float]:
    """Mean log-probability of each target's labels. `index` has the row of `logits` (N, V) for each label in turn."""
    where = torch.tensor(index, device=logits.device)
    label = torch.tensor([label for target in targets for label in target.labels], device=logits.device)
    parts = []
    for rows, labels in zip(where.split(_LOGIT_ROWS), label.split(_LOGIT_ROWS), strict=True):
        chunk = logits[rows].float()
        parts.append(chunk.gather(1, labels[:, None])[:, 0] - chunk.logsumexp(dim=-1))
    values = iter(torch.cat(parts).tolist())
    return [math.fsum(islice(values, len(target.labels))) / len(target.labels) for target in targets]


def _padded(rows: Sequence[Sequence[int]], value: int = 0, left: bool = False) -> list[list[int]]:
    width = max(1, *(len(row) for row in rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
