"""Scoring beliefs: the policy's teacher-forced log-probability of the right answer, at every turn of a rollout.

For the answer tokens a_1 … a_L and a context c (the prompt, and the turns and observations so far)

    log p(a | c) = 1/L Σ_j log π(a_j | c, template prefix, a_<j)          (arXiv 2510.14967)

The functions take a model and token ids, never a trainer. `"packed"` scoring runs a trajectory once, keeps its KV
cache, and then runs the probes of all turns in one short forward against that cache. A probe sees the context up to
its own boundary and itself, at the positions that it would have there. `"per_turn"` runs one sequence per boundary and
probe. It is exact for every causal model, and is the fallback for models whose cache cannot be branched.
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
from .models import base_model, changing_positions, forget_lengths, packed_obstacle, uncompiled
from .packing import ForwardBudget, PackedBatch, PlainBatch, Target, Unit, in_order, pack_rows, pack_trunks
from .probes import AnswerProbe

AliasReduction = Literal["max", "mean", "first"]
Method = Literal["auto", "packed", "per_turn"]

logger = logging.getLogger(__name__)


def reduce_aliases(log_probs: torch.Tensor, reduction: AliasReduction = "max") -> torch.Tensor:
    """
    Reduce the beliefs in M aliases of an answer to one.

    Args:
        log_probs (`torch.Tensor` of shape `(..., M)`): Mean log-probability of each alias, in nats.
        reduction (`str`, *optional*, defaults to `"max"`): `"max"`, `"mean"` (of the probabilities) or `"first"`.

    Returns:
        `torch.Tensor` of shape `(...)`: Log-belief, in nats.

    Raises:
        ValueError: `reduction` is none of these.
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
    Keys and values of rollouts, computed by another forward of the same model.

    Attributes:
        cache (`DynamicCache`): Every past key and value of every layer.
        rows (`Sequence[int]`): The cache row of each rollout.
        padding (`Sequence[int]`): Slots of that row before the rollout's first token.
        offset (`Sequence[int]`): Position at which the first token was run.
    """

    cache: Any
    rows: Sequence[int]
    padding: Sequence[int]
    offset: Sequence[int]

    def trunk(self, rollouts: Sequence[int]) -> Trunk:
        """The trunk of these rollouts."""
        rows, padding, offset = ([values[i] for i in rollouts] for values in self[1:])
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
    Compute the mean log-probability of each probe's answer tokens after each context (arXiv 2510.14967).

    No gradient is recorded, dropout is off, and every module's train or eval mode is restored. The softmax is taken in
    float32 whatever the model's dtype. Equal probes after equal contexts run once, and so does the beginning that the
    probes after one context share.

    Args:
        model (`nn.Module`): Causal language model; PEFT, FSDP and compiled wrappers are fine.
        sequences (`Sequence[Sequence[int]]`): Token ids of each rollout, prompt first.
        boundaries (`Sequence[Sequence[int]]`): Context lengths of each rollout: boundary c is the context
            `sequence[:c]`.
        probes (`Sequence[Sequence[AnswerProbe]]`): Probes to score after each context, one list per rollout.
        method (`str`, *optional*, defaults to `"auto"`): `"packed"`, `"per_turn"`, or `"auto"` for packed where it is
            exact.
        tokens_per_batch (`int`, *optional*, defaults to `16384`): Tokens of a forward, padding included. Bounds the
            memory for any number of rollouts, turns and probes. Only a single rollout may be longer.
        batch_size (`int`, *optional*): Largest number of rollouts (packed) or contexts (per turn) in a forward.
        synchronize (`Callable`, *optional*): Maps the number of forwards that this process needs to the maximum over
            all processes. The process then runs dummies until it has made that many. Without it ZeRO-3 and FSDP hang.
        cached ([`CachedContexts`], *optional*): Keys and values of the rollouts from another forward of this model,
            for example from generation. Then only the probes run, packed.
        memo (`dict`, *optional*): Scores by context and probe. Known scores are not computed again, and new ones are
            added. Drop it when the model's weights change.

    Returns:
        `list[torch.Tensor]`: One float32 tensor of shape (boundaries, probes) per rollout, in nats, on the CPU.

    Raises:
        ValueError: The lists differ in length, a boundary lies outside its sequence, a first answer token has nothing
            before it, or `"packed"` is requested for a model on which it may be wrong.
    """
    rollouts = _check(sequences, boundaries, probes)
    results = [[[0.0] * len(rollout.probes) for _ in rollout.boundaries] for rollout in rollouts]
    memo = {} if memo is None else memo
    units = _plan(rollouts, memo, results)
    budget = ForwardBudget(tokens_per_batch, batch_size, _vocabulary(model), next(model.parameters()).is_cuda)
    packed = _choose(model, "packed" if cached else method, _longest(units)) == "packed"
    positions = changing_positions(model)
    share = {} if positions is None else {"share": positions.share}
    batches = pack_trunks(units, budget, cached=cached is not None) if packed else pack_rows(units, budget, **share)
    idle = 0
    if synchronize is not None:
        needed = sum(batch.num_forwards - (cached is not None) for batch in batches)
        idle = synchronize(needed) - needed
    model = uncompiled(model)
    if batches or idle:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                forget_lengths(model)
                for target, value in _run(model, batch, cached):
                    memo[target.key] = value
                    for rollout, boundary, probe in target.places:
                        results[rollout][boundary][probe] = value
            for _ in range(idle):
                run_rows(model, _DUMMY)
    shapes = [(len(rollout.boundaries), len(rollout.probes)) for rollout in rollouts]
    scores = torch.tensor([value for rollout in results for values in rollout for value in values])
    return [part.view(shape) for part, shape in zip(scores.split([n * m for n, m in shapes]), shapes, strict=True)]


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
    Compare packed scoring with plain forwards on this very model.

    Runs four forwards on the shortest rollout, or on made-up tokens if there is none. Meant for the first batch: if a
    reason is returned, which is also logged as a warning, use `method="per_turn"` from then on.

    Args:
        model, sequences, boundaries, probes:
            As for [`score_beliefs`].
        tolerance (`float`, *optional*): Largest difference allowed, in nats, and relative for beliefs below -1.
            Defaults to [`rounding_error`]: 1e-3 in float32, 0.03 in float16 and 0.25 in bfloat16.
        synchronize (`Callable`, *optional*): Maps a number to its maximum over all processes, as for
            [`score_beliefs`]. Every process makes the same number of forwards and comes to the same decision.

    Returns:
        `str` or `None`: Why packed scoring must not be used, `None` if the scores agree.
    """
    rollouts = _check(sequences, boundaries, probes)
    maximum = synchronize or (lambda number: number)
    made_up = _Rollout([token % _vocabulary(model) for token in range(48)], [48], [AnswerProbe([1, 2, 3], 1, 3)])
    # What is too long for position embeddings that change with the length is scored per turn, batch by batch.
    positions = changing_positions(model)
    usable = [
        rollout
        for rollout in rollouts
        if rollout.probes
        and max(rollout.boundaries, default=0) > 1
        and (positions is None or _longest(_plan([rollout], {}, ())) <= positions.limit)
    ]
    rollout = min(usable, key=lambda rollout: max(rollout.boundaries), default=made_up)
    obstacle = packed_obstacle(model, _longest(_plan([rollout], {}, ())))
    if maximum(int(obstacle is not None)):
        return _refuse(obstacle or "another process cannot pack them")
    sequence, bounds, (probe, *_) = rollout
    # A boundary in the middle as well: only there can a probe see too many tokens.
    cuts = [(max(bounds) + 1) // 2, max(bounds)]
    (packed,) = score_beliefs(model, [sequence[: cuts[1]]], [cuts], [[probe]], method="packed")
    plain = []
    with evaluating(model), torch.no_grad():
        for target in (_target(sequence, cut, probe) for cut in cuts):
            row = [*sequence[: target.limit], *target.tokens]
            plain += run_rows(uncompiled(model), PlainBatch([row], [target]))
    difference = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(packed[:, 0].tolist(), plain, strict=True))
    allowed = rounding_error(model) if tolerance is None else tolerance
    agree = difference <= allowed  # false for NaN
    if not maximum(int(not agree)):
        return None
    where = "another process" if agree else type(base_model(model)).__name__
    return _refuse(
        f"on {where} packed scores differ from those of plain forwards, here by {difference:.2g} nats, where "
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
    """Choose the method, and log it once with its reason."""
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


def _plan(
    rollouts: Sequence[_Rollout], memo: Mapping[Hashable, float], results: Sequence[list[list[float]]]
) -> list[Unit]:
    """Fill in known scores. Returns one unit per rollout with something new to score, longest first."""
    seen: dict[Hashable, Target] = {}
    units = []
    for i, (sequence, boundaries, probes) in enumerate(rollouts):
        digests = _digests(sequence, boundaries)
        new = []
        for k, boundary in enumerate(boundaries):
            for m, probe in enumerate(probes):
                key = (digests[boundary], probe.key)
                if key in memo:
                    results[i][k][m] = memo[key]
                    continue
                if key not in seen:
                    seen[key] = _target(sequence, boundary, probe, key)
                    new.append(seen[key])
                seen[key].places.append((i, k, m))
        if new:
            units.append(Unit(sequence[: max(1, *(target.limit for target in new))], in_order(new), i))
    # Longest first gives little padding, and an out-of-memory error comes at once.
    return sorted(units, key=lambda unit: -len(unit.context))


def _digests(sequence: Sequence[int], boundaries: Sequence[int]) -> dict[int, bytes]:
    """A hash of each context: the turns of a rollout share prefixes, and the rollouts of a group their prompt."""
    digest, previous, digests = blake2b(digest_size=16), 0, {}
    for boundary in sorted(set(boundaries)):
        digest.update(array("q", sequence[previous:boundary]).tobytes())
        digests[boundary], previous = digest.digest(), boundary
    return digests


def _target(sequence: Sequence[int], limit: int, probe: AnswerProbe, key: Hashable = None) -> Target:
    """The tokens to run for a probe. The last answer token is not among them, because it predicts nothing of it."""
    labels = list(probe.token_ids[probe.answer_start : probe.answer_end])
    tokens = list(probe.token_ids[: probe.answer_end - 1])
    if probe.answer_start == 0:  # the context's last token predicts it, and runs again
        limit -= 1
        tokens.insert(0, sequence[limit])
    return Target(limit, tokens, labels, [], key)


def _longest(units: Sequence[Unit]) -> int:
    return max((t.limit + len(t.tokens) for unit in units for t in unit.targets), default=0)


def _run(
    model: nn.Module, batch: PackedBatch | PlainBatch, cached: CachedContexts | None
) -> Iterator[tuple[Target, float]]:
    """Score the targets of a batch."""
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
    """Largest difference that rounding explains, in nats: 32 × the epsilon of the least exact number format in use.

    With 16, a model of 30 layers in bfloat16 was refused (0.13 nats). Wrong keys or positions cost whole nats.
    """
    device = next(model.parameters()).device
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has as many digits
    return max(1e-3, 32 * max(torch.finfo(dtype).eps for dtype in dtypes))


def _vocabulary(model: nn.Module) -> int:
    return base_model(model).config.get_text_config().vocab_size
