"""
What goes wrong in a run: named signatures with their evidence, and what to change.

Only [`DoctorCallback`] needs transformers: it is imported when it is used.
"""

from typing import TYPE_CHECKING, Any

from .diagnosis import Diagnosis, diagnose
from .facts import RunFacts
from .signatures import Finding

if TYPE_CHECKING:
    from .callback import DoctorCallback

__all__ = ["Diagnosis", "DoctorCallback", "Finding", "RunFacts", "diagnose"]


def __getattr__(name: str) -> Any:
    if name == "DoctorCallback":
        from .callback import DoctorCallback

        return DoctorCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
