"""Questions for training and evaluation: loads the seven common sets and files of many layouts into one schema."""

from .contexts import build_corpus
from .prompts import NO_THINK_SYSTEM_PROMPT, SYSTEM_PROMPTS, THINK_SYSTEM_PROMPT, resolve_system_prompt
from .questions import hold_out, load_questions
from .sets import QUESTION_SETS, find_sources
from .validation import Finding, QuestionReport, check_questions

__all__ = [
    "Finding",
    "NO_THINK_SYSTEM_PROMPT",
    "QUESTION_SETS",
    "QuestionReport",
    "SYSTEM_PROMPTS",
    "THINK_SYSTEM_PROMPT",
    "build_corpus",
    "check_questions",
    "find_sources",
    "hold_out",
    "load_questions",
    "resolve_system_prompt",
]
