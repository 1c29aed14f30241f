"""Optional packages: imported where they are used, with an error that says how to install them."""

import importlib
from typing import Any


def require(package: str, purpose: str, extra: str) -> Any:
    """Imports a package that one of our extras installs; `purpose` says in the error what needs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        command = f'pip install "igpo-trl[{extra}]"'
        raise ImportError(f"{purpose} needs {package} ({error}). Install it with: {command}") from error
