"""Teaches a model that does not search yet the form of it: [`make_traces`], then [`warm_start`]."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import get_model as get_model
    from .run import warm_start as warm_start
    from .traces import Traces as Traces
    from .traces import make_traces as make_traces
    from .traces import read_traces as read_traces

_MODULES = {
    "Traces": "traces",
    "get_model": "models",
    "make_traces": "traces",
    "read_traces": "traces",
    "warm_start": "run",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
