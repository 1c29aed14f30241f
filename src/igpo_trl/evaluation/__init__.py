"""Evaluation: from rollouts to scores with intervals, comparisons of runs, and the quality of a search index.

Reads [`Trajectory`](../trajectory.py) records: no model is needed, neither torch nor TRL. What makes the rollouts is
[`igpo_trl.evaluation`].
"""

from .compare import Comparison, compare_runs
from .evidence import has_answer
from .intervals import bootstrap_interval, mcnemar_test, permutation_test
from .retrieval import RetrievalScores, score_retrieval
from .scores import RunScores, score_run
from .store import load_trajectories

__all__ = [
    "Comparison",
    "RetrievalScores",
    "RunScores",
    "bootstrap_interval",
    "compare_runs",
    "has_answer",
    "load_trajectories",
    "mcnemar_test",
    "permutation_test",
    "score_retrieval",
    "score_run",
]
