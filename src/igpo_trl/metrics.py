"""The metrics of [`igpo_trl.evaluation.metrics`], under a shorter name."""

from .evaluation.metrics import AnswerCoverExactMatch, AnswerExactMatch, AnswerF1

__all__ = ["AnswerCoverExactMatch", "AnswerExactMatch", "AnswerF1"]
