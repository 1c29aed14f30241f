"""Where a model comes from, by a name that others can look up, and never by a path of this machine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard

from ...files import looks_like_path

_NAMELESS = "a model without a name"
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
# Beside a model: files that may name the model it was made from, and where in them.
_ORIGINS = (
    ("adapter_config.json", ("base_model_name_or_path",)),
    ("warm_start.json", ("settings", "model")),
    ("config.json", ("_name_or_path",)),
)


class Origin(NamedTuple):
    """
    The model that another one was made from.

    Attributes:
        hub (`str` or `None`): Its name on the hub, if it is known.
        label (`str`): What to call it: that name, or the name of its folder.
    """

    hub: str | None
    label: str


def origin_of(name: str) -> Origin:
    """
    The model on the hub that a model was made from, through any number of folders on this machine.

    A folder says it in the configuration of an adapter, in the report of a warm start, in `config.json`, or in its
    model card (`base_model`). Where none does, the model is called by its folder, without those above it.
    """
    hub = _hub_name(name, set())
    return Origin(hub, hub or (_label(Path(name).expanduser()) if name else _NAMELESS))


def _hub_name(name: str, seen: set[str]) -> str | None:
    if not name or name in seen:
        return None
    seen.add(name)
    if match := _SNAPSHOT.search(f"{name}/"):  # a download in the cache of the hub
        return f"{match[1]}/{match[2]}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return next((found for each in _named_in(folder) if (found := _hub_name(each, seen)) is not None), None)
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not looks_like_path(name) else None


def _label(folder: Path) -> str:
    folder = folder if folder.name else folder.absolute()
    if folder.name.startswith("checkpoint-"):
        return f"{folder.absolute().parent.name}, step {folder.name.removeprefix('checkpoint-')}"
    return folder.name or _NAMELESS


def _named_in(folder: Path) -> Iterator[str]:
    """The models that the files of a folder name."""
    for file, keys in _ORIGINS:
        value: Any = _read_json(folder / file)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield value
    try:
        base = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.base_model
    except (OSError, ValueError, AttributeError):
        return
    yield from (each for each in (base if isinstance(base, list) else [base]) if isinstance(each, str))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
