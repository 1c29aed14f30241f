"""Beliefs: the policy's own teacher-forced log-probability of the right answer, at every turn of a rollout.

For the answer tokens a_1 … a_L and a context c (the prompt, and the turns and observations so far)

    log p(a | c) = 1/L Σ_j log π(a_j | c, template prefix, a_<j)          (arXiv 2510.14967)

The module takes a model and token ids, never a trainer. `"packed"` scoring runs the trajectory once and keeps its KV
cache, then runs the probes of all turns in one short forward against that cache: a probe sees the context up to its
own boundary and itself, at the positions that it would have had there. `"per_turn"` runs one sequence per boundary and
probe; it is exact for every causal model and is what models get whose cache cannot be branched.
"""

import logging
import math
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .branching import Trunk, evaluating, run_branches, run_rows, run_trunk
from .models import ABSOLUTE, base_model, branching_obstacle, uncompiled
from .packing import Budget, PackedBatch, PlainBatch, Target, Unit, in_order, pack_rows, pack_trunks
from .probes import AnswerProbe

AliasReduction = Literal["max", "mean", "first"]
Method = Literal["auto", "packed", "per_turn"]

logger = logging.getLogger(__name__)


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


class CachedContexts(NamedTuple):
    """
    Keys and values of rollouts, as another forward of the same model has left them.

    Attributes:
        cache (`DynamicCache`): every past key and value of every layer.
        rows (list of `int`): the cache's row of each rollout.
        padding (list of `int`): slots of that row before the rollout's first token.
        offset (list of `int`): position that the first token was run at.
    """

    cache: Any
    rows: Sequence[int]
    padding: Sequence[int]
    offset: Sequence[int]

    def trunk(self, rollouts: Sequence[int]) -> Trunk:
        """These rollouts as a trunk."""
        rows, padding, offset = ([of[i] for i in rollouts] for of in self[1:])
        return Trunk.of_rows(self.cache, rows, padding, offset)


def score_beliefs(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    boundaries: Sequence[Sequence[int]],
    probes: Sequence[Sequence[AnswerProbe]],
    *,
    method: Method = "auto",
    tokens_per_batch: int = 16384,
    batch_size: int | None = None,
    synchronize: Callable[[int], int] | None = None,
    cached: CachedContexts | None = None,
    memo: dict[Hashable, float] | None = None,
) -> list[torch.Tensor]:
    """
    Mean log-probability of each probe's answer tokens after each context of each rollout (arXiv 2510.14967).

    No gradient is recorded and dropout is off; every module's train/eval mode is restored. The softmax is taken in
    float32 whatever the model's dtype. Equal probes after equal contexts are run once, and so is what the probes after
    one context begin with in common.

    Args:
        model (`nn.Module`): causal language model (a PEFT, FSDP or compiled wrapper is fine).
        sequences (list of list of `int`): token ids of each rollout, prompt first.
        boundaries (list of list of `int`): context lengths of each rollout: boundary c is the context `sequence[:c]`.
        probes (list of list of [`AnswerProbe`]): what to score after each context, one list per rollout.
        method (`str`, *optional*, defaults to `"auto"`): `"packed"`, `"per_turn"`, or the first that is exact.
        tokens_per_batch (`int`, *optional*, defaults to `16384`): tokens of a forward, padding included. Bounds the
            memory, whatever the number of rollouts, turns and probes; only a single rollout may be longer.
        batch_size (`int`, *optional*): most rollouts (packed) or contexts (per turn) of a forward.
        synchronize (`Callable`, *optional*): given the number of forwards that this process needs, returns how many
            all processes run (the maximum over processes). The difference is run on dummies, so that every process
            makes the same number of forwards: ZeRO-3 and FSDP hang otherwise.
        cached ([`CachedContexts`], *optional*): keys and values of the rollouts that another forward of this model has
            left, such as that of a generation. Only the probes are run then, packed.
        memo (`dict`, *optional*): scores by context and probe. What is in it is not run, and what is run is added. It
            must be dropped when the model's weights change.

    Returns:
        list of `torch.Tensor`: per rollout (boundaries, probes), float32, in nats, on the CPU.

    Raises:
        `ValueError`: if the lists differ in length, a boundary lies outside its sequence, a first answer token has
            nothing before it, or `"packed"` is asked of a model that it would be wrong on.
    """
    rollouts = _check(sequences, boundaries, probes)
    results = [torch.zeros(len(rollout.boundaries), len(rollout.probes)) for rollout in rollouts]
    memo = {} if memo is None else memo
    units = _plan(rollouts, memo, results)
    budget = Budget(tokens_per_batch, batch_size, _vocabulary(model))
    packed = _choose(model, "packed" if cached else method, _longest(units)) == "packed"
    batches = pack_trunks(units, budget) if packed else pack_rows(units, budget)
    idle = 0
    if synchronize is not None:
        needed = sum(batch.num_forwards - (cached is not None) for batch in batches)
        idle = synchronize(needed) - needed
    model = uncompiled(model)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            for target, value in _run(model, batch, cached):
                memo[target.key] = value
                for rollout, boundary, probe in target.places:
                    results[rollout][boundary, probe] = value
        for _ in range(idle):
            run_rows(model, _DUMMY)
    return results


def packed_obstacle(model: nn.Module, longest: int | None = None) -> str | None:
    """
    Why packed scoring is not known to be exact on this model, or `None` where it is.

    Packed scoring needs a cache that holds every past token in every layer, positions that can be given, and an
    attention that takes an arbitrary mask.

    Args:
        model (`nn.Module`): causal language model.
        longest (`int`, *optional*): tokens of the longest context with its probe; needed for models whose position
            embeddings change beyond some length.
    """
    return branching_obstacle(model, longest)


def cached_obstacle(model: nn.Module, offset: bool = False) -> str | None:
    """
    Why the keys and values of another forward must not be scored against, or `None` where they may.

    Args:
        model (`nn.Module`): what the forward was of, in the mode that it was run in.
        offset (`bool`): whether that forward may have counted left padding as positions.
    """
    base = base_model(model)
    if offset and base.config.model_type in ABSOLUTE:
        return "its positions are absolute, and padding was counted among them"
    if any(module.training and isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout was on"
    # The others are called as functions, in the attention.
    config = base.config.get_text_config()
    functional = any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))
    return "dropout was on" if functional and base.training else None


def check_beliefs(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    boundaries: Sequence[Sequence[int]],
    probes: Sequence[Sequence[AnswerProbe]],
    *,
    tolerance: float | None = None,
    synchronize: Callable[[int], int] | None = None,
) -> str | None:
    """
    Why packed scoring must not be used on this very model, or `None` where it agrees with plain forwards.

    Tried on the shortest of the rollouts, or on made-up tokens where there is none: four forwards. Meant for the first
    batch; where it returns a reason, which it logs as a warning, use `method="per_turn"` from then on.

    Args:
        model, sequences, boundaries, probes: as for [`score_beliefs`].
        tolerance (`float`, *optional*): largest difference allowed, in nats, and relative for beliefs below -1. By
            default what rounding explains: 1e-3 in float32, 0.016 in float16 and 0.125 in bfloat16.
        synchronize (`Callable`, *optional*): the maximum over processes of a number, as for [`score_beliefs`]. Every
            process makes the same number of forwards and comes to the same decision.

    Returns:
        `str` or `None`: the reason.
    """
    rollouts = _check(sequences, boundaries, probes)
    together = synchronize or (lambda number: number)
    obstacle = packed_obstacle(model, _longest(_plan(rollouts, {}, ())))
    if together(int(obstacle is not None)):
        return _refuse(obstacle or "another process cannot pack them")
    made_up = _Rollout([token % _vocabulary(model) for token in range(48)], [48], [AnswerProbe([1, 2, 3], 1, 3)])
    usable = [rollout for rollout in rollouts if rollout.probes and max(rollout.boundaries, default=0) > 1]
    sequence, bounds, (probe, *_) = min(usable, key=lambda rollout: max(rollout.boundaries), default=made_up)
    # Only in the middle can a probe see too much, too little or at the wrong place.
    cuts = [(max(bounds) + 1) // 2, max(bounds)]
    (packed,) = score_beliefs(model, [sequence[: cuts[1]]], [cuts], [[probe]], method="packed")
    plain = []
    with evaluating(model), torch.no_grad():
        for target in (_target(sequence, cut, probe) for cut in cuts):
            row = [*sequence[: target.limit], *target.tokens]
            plain += run_rows(uncompiled(model), PlainBatch([row], [target]))
    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(packed[:, 0].tolist(), plain, strict=True))
    allowed = rounding_error(model) if tolerance is None else tolerance
    agree = apart <= allowed  # NaN does not
    if not together(int(not agree)):
        return None
    where = "another process" if agree else type(base_model(model)).__name__
    return _refuse(
        f"on {where} packed scores are not those of plain forwards; here they are {apart:.2g} nats apart, where "
        f"rounding explains {allowed:.2g}. Please report this model"
    )


class _Rollout(NamedTuple):
    """One rollout's part of the arguments."""

    sequence: Sequence[int]
    boundaries: Sequence[int]
    probes: Sequence[AnswerProbe]


_DUMMY = PlainBatch([[0]], [Target(0, [0], [0], [])])


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


def _choose(model: nn.Module, method: Method, longest: int) -> Method:
    """The method to use, logged once with its reason."""
    if method not in ("auto", "packed", "per_turn"):
        raise ValueError(f"`method` must be 'auto', 'packed' or 'per_turn', got {method!r}.")
    if method == "per_turn":
        return method
    obstacle = packed_obstacle(model, longest)
    if not obstacle:
        _log_once(logging.INFO, f"Beliefs are scored packed: {type(base_model(model)).__name__} can branch its cache.")
        return "packed"
    if method == "packed":
        raise ValueError(f"`method='packed'` may be wrong here: {obstacle}. Use 'auto' or 'per_turn'.")
    _refuse(obstacle)
    return "per_turn"


def _refuse(reason: str) -> str:
    _log_once(logging.WARNING, f"Beliefs are scored per turn, which is exact but slower: {reason}.")
    return reason


@lru_cache(maxsize=64)
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _plan(rollouts: Sequence[_Rollout], memo: Mapping[Hashable, float], results: Sequence[torch.Tensor]) -> list[Unit]:
    """What to run: one unit per rollout with something of its own to score, longest first. Fills in what is known."""
    seen: dict[Hashable, Target] = {}
    units = []
    for i, (sequence, boundaries, probes) in enumerate(rollouts):
        digests = _digests(sequence, boundaries)
        new = []
        for k, boundary in enumerate(boundaries):
            for m, probe in enumerate(probes):
                key = (digests[boundary], tuple(probe.token_ids[: probe.answer_end]), probe.answer_start)
                if key in memo:
                    results[i][k, m] = memo[key]
                    continue
                if key not in seen:
                    seen[key] = _target(sequence, boundary, probe)._replace(key=key)
                    new.append(seen[key])
                seen[key].places.append((i, k, m))
        if new:
            units.append(Unit(sequence[: max(1, *(target.limit for target in new))], in_order(new), i))
    # Longest first: little padding, and an out-of-memory error comes at once.
    return sorted(units, key=lambda unit: -len(unit.context))


def _digests(sequence: Sequence[int], boundaries: Sequence[int]) -> dict[int, bytes]:
    """A hash of each context: the turns of a rollout share prefixes, and the rollouts of a group their prompt."""
    digest, done, digests = blake2b(digest_size=16), 0, {}
    for boundary in sorted(set(boundaries)):
        digest.update(array("q", sequence[done:boundary]).tobytes())
        digests[boundary], done = digest.digest(), boundary
    return digests


def _target(sequence: Sequence[int], limit: int, probe: AnswerProbe) -> Target:
    """What to run for a probe: the last answer token predicts nothing that is asked for."""
    labels = list(probe.token_ids[probe.answer_start : probe.answer_end])
    tokens = list(probe.token_ids[: probe.answer_end - 1])
    if probe.answer_start == 0:  # predicted by the context's last token, which is run again
        limit -= 1
        tokens.insert(0, sequence[limit])
    return Target(limit, tokens, labels, [])


def _longest(units: Sequence[Unit]) -> int:
    return max((t.limit + len(t.tokens) for unit in units for t in unit.targets), default=0)


def _run(
    model: nn.Module, batch: PackedBatch | PlainBatch, cached: CachedContexts | None
) -> Iterator[tuple[Target, float]]:
    """The score of each target of a batch."""
    if isinstance(batch, PlainBatch):
        yield from zip(batch.targets, run_rows(model, batch), strict=True)
        return
    if cached is None:
        trunk = run_trunk(model, [unit.context for unit in batch.units])
    else:
        trunk = cached.trunk([unit.rollout for unit in batch.units])
    for rows in batch.chunks:
        yield from zip([target for row in rows for target in row], run_branches(model, trunk, rows), strict=True)


def rounding_error(model: nn.Module) -> float:
    """What rounding explains, in nats: sixteen times that of the least exact number format on the way."""
    device = next(model.parameters()).device
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has as many digits
    return max(1e-3, 16 * max(torch.finfo(dtype).eps for dtype in dtypes))


def _vocabulary(model: nn.Module) -> int:
    return base_model(model).config.get_text_config().vocab_size
