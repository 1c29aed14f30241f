"""
Evaluation: rollouts of a model on questions, their scores with intervals, comparisons of runs, and the quality of an
index.

Only `roll_out` needs a model: it is imported when it is used. Everything else reads [`Trajectory`](../trajectory.py)
records, and needs neither torch nor TRL.
"""

from typing import TYPE_CHECKING, Any

from ..trajectory import load_run
from .audit import Audit, audit_questions, check_answerable
from .compare import Comparison, compare_runs
from .intervals import bootstrap_interval, mcnemar_test, permutation_test
from .retrieval import RetrievalScores, check_retrieval, score_retrieval
from .scores import RunScores, has_answer, score_run
from .settings import EvaluationSettings

load_trajectories = load_run  # its former name

if TYPE_CHECKING:
    from .rollouts import roll_out

__all__ = [
    "Audit",
    "Comparison",
    "EvaluationSettings",
    "RetrievalScores",
    "RunScores",
    "audit_questions",
    "bootstrap_interval",
    "check_answerable",
    "check_retrieval",
    "compare_runs",
    "has_answer",
    "load_run",
    "load_trajectories",
    "mcnemar_test",
    "permutation_test",
    "roll_out",
    "score_retrieval",
    "score_run",
]


def __getattr__(name: str) -> Any:
    if name == "roll_out":
        from .rollouts import roll_out

        return roll_out
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
