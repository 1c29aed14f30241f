"""IGPO for TRL: turn-level information gain for agents that search before they answer."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import IGPOConfig
    from .rewards import answer_reward
    from .trainer import IGPOTrainer

try:
    __version__ = version("igpo-trl")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

_PUBLIC = {"IGPOConfig": ".config", "IGPOTrainer": ".trainer", "answer_reward": ".rewards"}
__all__ = ["IGPOConfig", "IGPOTrainer", "__version__", "answer_reward"]


def __getattr__(name: str) -> Any:
    # Lazy: `igpo --help`, reports and the search server need neither TRL nor torch.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
