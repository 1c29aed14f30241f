"""Beliefs: the policy's teacher-forced log-probability of the right answer before every turn of a rollout."""

from .models import cached_obstacle, packed_obstacle
from .probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, AnswerProbe, build_probes
from .scoring import CachedContexts, check_beliefs, reduce_aliases, score_beliefs

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
