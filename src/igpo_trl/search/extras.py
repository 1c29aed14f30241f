"""Optional packages: imported where they are used, with an error that says how to install them."""

import importlib
from typing import Any


def require(package: str, purpose: str, extra: str) -> Any:
    """
    Imports an optional package.

    Args:
        package (`str`):
            Name to import.
        purpose (`str`):
            What needs it, for the error.
        extra (`str`):
            The extra of this package that installs it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {package} ({error}). Install it with: pip install "igpo-trl[{extra}]"'
        ) from error
