"""Beliefs: the policy's own teacher-forced log-probability of the right answer, at every turn of a rollout.

For the answer tokens a_1 … a_L and a context c (the prompt, and the turns and observations so far)

    log p(a | c) = 1/L Σ_j log π(a_j | c, template prefix, a_<j)          (arXiv 2510.14967)

The module takes a model and token ids, never a trainer. `"packed"` scoring runs the trajectory once and keeps its KV
cache, then runs the probes of all turns in one short forward against that cache: a probe sees the context up to its
own boundary and itself, at the positions that it would have had there. `"per_turn"` runs one sequence per boundary and
probe; it is exact for every causal model and is what models without a plain KV cache get.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, AnswerProbe, build_probes

__all__ = [
    "DEFAULT_TEMPLATE",
    "NO_THINK_TEMPLATE",
    "AnswerProbe",
    "build_probes",
    "packed_obstacle",
    "reduce_aliases",
    "score_beliefs",
]

AliasReduction = Literal["max", "mean", "first"]
Method = Literal["auto", "packed", "per_turn"]

# Rows of logits turned to float32 at a time: bounds the memory of a 150k-token vocabulary to about 150 MB.
_LOGIT_ROWS = 256


def reduce_aliases(log_probs: torch.Tensor, reduction: AliasReduction = "max") -> torch.Tensor:
    """
    One belief per context from the beliefs in each alias.

    Args:
        log_probs (`torch.Tensor` of shape (..., M)): mean log-probability of each alias, in nats.
        reduction (`str`): `"max"`, `"mean"` (of the probabilities) or `"first"`.

    Returns:
        `torch.Tensor` of shape (...): log-belief, in nats.
    """
    if reduction == "max":
        return log_probs.amax(dim=-1)
    if reduction == "mean":
        return log_probs.logsumexp(dim=-1) - math.log(log_probs.shape[-1])
    if reduction == "first":
        return log_probs[..., 0]
    raise ValueError(f"`reduction` must be 'max', 'mean' or 'first', got {reduction!r}.")


def score_beliefs(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    boundaries: Sequence[Sequence[int]],
    probes: Sequence[Sequence[AnswerProbe]],
    *,
    method: Method = "auto",
    batch_size: int = 8,
    synchronize: Callable[[int], int] | None = None,
) -> list[torch.Tensor]:
    """
    Mean log-probability of each probe's answer tokens after each context of each rollout (arXiv 2510.14967).

    No gradient is recorded and dropout is off; every module's train/eval mode is restored. The softmax is taken in
    float32 whatever the model's dtype.

    Args:
        model (`nn.Module`): causal language model (a PEFT or FSDP wrapper is fine).
        sequences (list of list of `int`): token ids of each rollout, prompt first.
        boundaries (list of list of `int`): context lengths of each rollout: boundary c is the context `sequence[:c]`.
        probes (list of list of [`AnswerProbe`]): what to score after each context, one list per rollout.
        method (`str`, *optional*, defaults to `"auto"`): `"packed"`, `"per_turn"`, or the first that is exact.
        batch_size (`int`, *optional*, defaults to `8`): rollouts (packed) or contexts (per turn) per forward.
        synchronize (`Callable`, *optional*): given the number of batches that this process needs, returns how many
            all processes run (the maximum over processes). The difference is run on dummies, so that every process
            makes the same number of forwards: ZeRO-3 and FSDP hang otherwise.

    Returns:
        list of `torch.Tensor`: per rollout (boundaries, probes), float32, in nats, on the CPU.

    Raises:
        `ValueError`: if the lists differ in length, a boundary lies outside its sequence, a first answer token has
            nothing before it, or `"packed"` is asked of a model that it would be wrong on.
    """
    rollouts = _check(sequences, boundaries, probes)
    if method not in ("auto", "packed", "per_turn"):
        raise ValueError(f"`method` must be 'auto', 'packed' or 'per_turn', got {method!r}.")
    obstacle = packed_obstacle(model)
    if method == "packed" and obstacle:
        raise ValueError(f"`method='packed'` would be wrong or slow here: {obstacle}. Use 'auto' or 'per_turn'.")
    results = [torch.zeros(len(rollout.boundaries), len(rollout.probes)) for rollout in rollouts]
    use_packed = not obstacle and method != "per_turn"
    units = _rollout_units(rollouts) if use_packed else _context_units(rollouts)
    score = _score_packed if use_packed else _score_per_turn
    # Longest first: little padding, and an out-of-memory error comes at once.
    units.sort(key=lambda unit: -len(unit.context))
    batches = [units[i : i + batch_size] for i in range(0, len(units), batch_size)]
    if synchronize is not None:
        batches += [[_DUMMY]] * (synchronize(len(batches)) - len(batches))
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            values = iter(score(model, batch).tolist())
            for unit in batch:
                for target in unit.targets:
                    value = next(values)
                    if target.rollout is not None:
                        results[target.rollout][target.boundary, target.probe] = value
    return results


def packed_obstacle(model: nn.Module) -> str | None:
    """
    Why packed scoring is not exact on this model, or `None` where it is.

    Packed scoring needs a cache that holds every past token in every layer, positions that can be given, and an
    attention that takes an arbitrary mask.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    base = _base_model(model)
    config = base.config.get_text_config()
    name = type(base).__name__
    accepted = inspect.signature(type(base).forward).parameters
    missing = {"position_ids", "past_key_values"} - set(accepted)
    if missing:
        return f"{name}.forward takes no {', '.join(sorted(missing))}"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return f"{name} biases attention by token distance (alibi), which a packed row changes"
    if getattr(base, "_is_stateful", False):
        return f"{name} keeps a recurrent state"
    odd = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    if odd:
        return f"{name} has layers that do not keep every past token ({', '.join(sorted(odd))})"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {config._attn_implementation!r} takes no arbitrary mask ('sdpa' and 'eager' do)"
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        return "prompt-learning adapters put tokens of their own into the cache"
    return None


class _Target(NamedTuple):
    """One probe after one context, and where its score goes (`rollout` is None for a dummy)."""

    probe_tokens: AnswerProbe
    limit: int  # context length
    rollout: int | None
    boundary: int
    probe: int


class _Unit(NamedTuple):
    """What one batch row is made from: a trunk of tokens and the probes to score against it."""

    context: Sequence[int]
    targets: list[_Target]


class _Rollout(NamedTuple):
    sequence: Sequence[int]
    boundaries: Sequence[int]
    probes: Sequence[AnswerProbe]


_DUMMY = _Unit([0], [_Target(AnswerProbe([0, 0], 1, 2), 1, None, 0, 0)])


def _check(
    sequences: Sequence[Sequence[int]], boundaries: Sequence[Sequence[int]], probes: Sequence[Sequence[AnswerProbe]]
) -> list[_Rollout]:
    if not len(sequences) == len(boundaries) == len(probes):
        raise ValueError(
            "`sequences`, `boundaries` and `probes` must have one entry per rollout, got "
            f"{len(sequences)}, {len(boundaries)} and {len(probes)}."
        )
    rollouts = [_Rollout(*rollout) for rollout in zip(sequences, boundaries, probes, strict=True)]
    for i, rollout in enumerate(rollouts):
        needs_context = any(probe.answer_start == 0 for probe in rollout.probes)
        for boundary in rollout.boundaries:
            if not 0 <= boundary <= len(rollout.sequence):
                raise ValueError(
                    f"Rollout {i} has {len(rollout.sequence)} tokens, got the boundary {boundary} outside of it."
                )
            if boundary == 0 and needs_context:
                raise ValueError(f"Rollout {i}: an answer that starts its probe needs a context, got boundary 0.")
    return rollouts


def _rollout_units(rollouts: Sequence[_Rollout]) -> list[_Unit]:
    """One unit per rollout: its longest context, and all probes after all contexts."""
    units = []
    for i, (sequence, boundaries, probes) in enumerate(rollouts):
        targets = [_Target(probe, c, i, k, m) for k, c in enumerate(boundaries) for m, probe in enumerate(probes)]
        if targets:
            units.append(_Unit(sequence[: max(boundaries)], targets))
    return units


def _context_units(rollouts: Sequence[_Rollout]) -> list[_Unit]:
    """One unit per context and probe."""
    return [
        _Unit(unit.context[: target.limit], [target]) for unit in _rollout_units(rollouts) for target in unit.targets
    ]


def _score_packed(model: nn.Module, units: Sequence[_Unit]) -> torch.Tensor:
    """Trunk once with its cache, then all probes of all units in one forward; scores in the order of the targets."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    trunk_length = max(1, *(len(unit.context) for unit in units))
    trunk = torch.zeros(len(units), trunk_length, dtype=torch.long)
    for row, unit in enumerate(units):
        trunk[row, : len(unit.context)] = torch.tensor(unit.context, dtype=torch.long)
    cache = DynamicCache(config=_base_model(model).config.get_text_config())
    # No mask: padding stands on the right, where causal attention never looks, and the plain causal kernel is fastest.
    outputs = model(
        input_ids=trunk.to(device), past_key_values=cache, use_cache=True, **_keep_logits(model, torch.tensor([0]))
    )
    cache = outputs.past_key_values
    del outputs

    # A row holds the probes' tokens in any order, for mask and positions are explicit: those whose logits are needed
    # come last, so that one slice of the hidden states goes through the LM head.
    rows = [_pack_row(unit) for unit in units]
    width = max(len(row.tokens) for row in rows)
    tail = max(len(row.labels) for row in rows)
    tokens = _left_pad([row.tokens for row in rows], width, 0)
    position = _left_pad([row.positions for row in rows], width, 0)
    limit = _left_pad([row.limits for row in rows], width, 0)
    owner = _left_pad([row.owners for row in rows], width, -1)
    sees_trunk = torch.arange(trunk_length) < limit[:, :, None]
    sees_probe = (owner[:, :, None] == owner[:, None, :]) & (position[:, :, None] >= position[:, None, :])
    dtype = _activation_dtype(model, device)
    mask = torch.zeros(len(units), 1, width, trunk_length + width, dtype=dtype, device=device)
    visible = torch.cat([sees_trunk, sees_probe], dim=-1)[:, None].to(device)
    mask.masked_fill_(~visible, torch.finfo(dtype).min)
    logits = model(
        input_ids=tokens.to(device),
        position_ids=position.to(device),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **_keep_logits(model, torch.arange(width - tail, width)),
    ).logits
    logits = logits[:, -tail:]
    index = [
        row * tail + tail - len(packed.labels) + j
        for row, packed in enumerate(rows)
        for j in range(len(packed.labels))
    ]
    labels = [label for packed in rows for label in packed.labels]
    return _mean_log_probs(logits.flatten(0, 1), index, labels, units)


class _Row(NamedTuple):
    tokens: list[int]
    positions: list[int]
    limits: list[int]
    owners: list[int]
    labels: list[int]


def _pack_row(unit: _Unit) -> _Row:
    """All probe tokens of a unit, those that predict answer tokens last, in the order of the targets."""
    head = _Row([], [], [], [], [])
    tail = _Row([], [], [], [], [])
    for owner, target in enumerate(unit.targets):
        tokens, limit, labels = _run(unit, target)
        split = len(tokens) - len(labels)
        for part, chunk, first in ((head, tokens[:split], limit), (tail, tokens[split:], limit + split)):
            part.tokens.extend(chunk)
            part.positions.extend(range(first, first + len(chunk)))
            part.limits.extend([limit] * len(chunk))
            part.owners.extend([owner] * len(chunk))
        tail.labels.extend(labels)
    return _Row(*(a + b for a, b in zip(head, tail, strict=True)))


def _run(unit: _Unit, target: _Target) -> tuple[list[int], int, list[int]]:
    """Tokens to run for a probe, the context length they see, and the answer tokens, which the last ones predict."""
    probe, limit = target.probe_tokens, target.limit
    labels = list(probe.token_ids[probe.answer_start : probe.answer_end])
    tokens = list(probe.token_ids[: probe.answer_end - 1])
    if probe.answer_start == 0:  # predicted by the context's last token, which is run again
        limit -= 1
        tokens.insert(0, unit.context[limit])
    return tokens, limit, labels


def _score_per_turn(model: nn.Module, units: Sequence[_Unit]) -> torch.Tensor:
    """One right-padded row per context and probe; scores in the order of the units."""
    device = next(model.parameters()).device
    runs = [_run(unit, unit.targets[0]) for unit in units]
    rows = [list(unit.context[:limit]) + tokens for unit, (tokens, limit, _) in zip(units, runs, strict=True)]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    needed = [
        len(row) - len(labels) + j for row, (*_, labels) in zip(rows, runs, strict=True) for j in range(len(labels))
    ]
    kept, column = torch.tensor(needed).unique(return_inverse=True)
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        use_cache=False,
        **_keep_logits(model, kept),
    ).logits
    if logits.shape[1] != len(kept):
        logits = logits[:, kept.to(device)]
    row_of = [row for row, (*_, labels) in enumerate(runs) for _ in labels]
    index = [row * len(kept) + int(c) for row, c in zip(row_of, column, strict=True)]
    return _mean_log_probs(logits.flatten(0, 1), index, [label for *_, labels in runs for label in labels], units)


def _mean_log_probs(logits: torch.Tensor, index: list[int], labels: list[int], units: Sequence[_Unit]) -> torch.Tensor:
    """Mean log-probability of each target's answer tokens; `index` picks the logit row (N, V) of each label."""
    where = torch.tensor(index, device=logits.device)
    label = torch.tensor(labels, device=logits.device)
    parts = []
    for rows, targets in zip(where.split(_LOGIT_ROWS), label.split(_LOGIT_ROWS), strict=True):
        chunk = logits[rows].float()
        parts.append(chunk.gather(1, targets[:, None])[:, 0] - chunk.logsumexp(dim=-1))
    log_probs = torch.cat(parts)
    spans = [t.probe_tokens.answer_end - t.probe_tokens.answer_start for unit in units for t in unit.targets]
    counts = torch.tensor(spans, device=logits.device)
    owner = torch.repeat_interleave(torch.arange(len(spans), device=logits.device), counts)
    return log_probs.new_zeros(len(spans)).index_add_(0, owner, log_probs) / counts


def _left_pad(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])


def _base_model(model: nn.Module) -> Any:
    """The transformers model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _keep_logits(model: nn.Module, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that limits the LM head to these positions, where the model has it."""
    base = _base_model(model)
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        return {"logits_to_keep": positions.to(next(model.parameters()).device)}
    return {}


def _activation_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype attention runs in, which its additive mask must share."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; each module gets its own mode back, for some may be frozen in eval mode on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
