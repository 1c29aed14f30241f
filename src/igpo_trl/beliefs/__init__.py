"""Beliefs: the policy's own teacher-forced log-probability of the right answer, at every turn of a rollout."""

from .probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, AnswerProbe, build_probes
from .scoring import CachedContexts, cached_obstacle, check_beliefs, packed_obstacle, reduce_aliases, score_beliefs

__all__ = [
    "DEFAULT_TEMPLATE",
    "NO_THINK_TEMPLATE",
    "AnswerProbe",
    "CachedContexts",
    "build_probes",
    "check_beliefs",
    "cached_obstacle",
    "packed_obstacle",
    "reduce_aliases",
    "score_beliefs",
]
