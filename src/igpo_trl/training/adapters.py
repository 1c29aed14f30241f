"""A PEFT adapter, in a directory or on the hub: what it was trained on, and how to train it further."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from ..files import looks_like_path

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def find_adapter(name: str, revision: str | None = None) -> str | None:
    """
    The directory of an adapter: `name` itself, or where it is downloaded to if it is on the hub.

    `None` if it is no adapter, or neither there nor here.
    """
    if Path(name, _CONFIG).is_file():
        return name
    if file_on_hub(name, _CONFIG, revision) is None:
        return None
    return snapshot_download(name, revision=revision, ignore_patterns=["*checkpoint-*/*", "runs/*", "*.png"])


def file_on_hub(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model on the hub, downloaded; `None` if there is none, or no hub, or `name` is a path."""
    if not name or looks_like_path(name) or Path(name).exists():
        return None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError):  # a model that does not exist is a clear error when it is loaded
        return None


def base_of_adapter(directory: str | Path, given: str | None = None) -> str:
    """
    The name of the model that an adapter was trained on, or of a model that is `given` in its place.

    Raises:
        FileNotFoundError: A file is missing, or the base model is.
        ValueError: `adapter_config.json` is damaged or names no base model.
    """
    path = Path(directory, _CONFIG)
    if not path.is_file():
        raise FileNotFoundError(f"no {_CONFIG} in {directory}: it is not a PEFT adapter.")
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    base = given or base
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} names no base model. Set `base_model_name_or_path` in it.")
    if not any(Path(directory, name).is_file() for name in _WEIGHTS):
        raise FileNotFoundError(f"no {_WEIGHTS[0]} in {directory}: the adapter has no weights.")
    if looks_like_path(base) and not Path(base).is_dir():
        raise FileNotFoundError(
            f"the base model of the adapter {directory} is missing: no such directory: {base}. If it has moved, "
            f"change `base_model_name_or_path` in {path}."
        )
    return base


def check_adapter(directory: str, peft_config: Any) -> tuple[str, str]:
    """
    Check an adapter that is to be trained further, and return its base model and where its tokenizer is.

    Raises as [`base_of_adapter`], and `ValueError` if there is a `peft_config` for another adapter.
    """
    base = base_of_adapter(directory)
    if peft_config:
        raise ValueError(
            f"{directory} is an adapter, which is trained further, and `peft_config` (`use_peft`) asks for a new one. "
            "Leave that out, or give the adapter's base model, or the two merged into one model."
        )
    return base, directory if Path(directory, "tokenizer_config.json").is_file() else base


def load_trainable(directory: str, args: Any, load_base: Callable[..., Any], quantization_config: Any = None) -> Any:
    """
    The `PeftModel` of an adapter in a directory, on its base model, with trainable weights.

    `load_base` gets the options with which `GRPOTrainer` loads a model. `args.model_init_kwargs` is used up.
    """
    from peft import PeftModel

    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    revision = json.loads(Path(directory, _CONFIG).read_text(encoding="utf-8")).get("revision")
    options["revision"] = revision or "main"  # that of the arguments is not the base model's
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    args.model_init_kwargs = None
    base = load_base(base_of_adapter(directory), **options)
    plugin = args.deepspeed_plugin
    # The weights of ZeRO-3 have one type, as in `GRPOTrainer`.
    one_type = plugin is not None and plugin.zero_stage == 3 and quantization_config is None
    return PeftModel.from_pretrained(base, directory, is_trainable=True, autocast_adapter_dtype=not one_type)
