"""igpo train --estimate: what a training needs, before there is a model or a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import AutoConfig
from trl import ModelConfig, get_peft_config

from ..config import IGPOConfig
from ..training.adapters import base_of_adapter, find_adapter
from ..training.estimate import estimate
from .arguments import UsageError
from .checks import check_model

_SHARDING = ("none", "zero2", "zero3", "fsdp2")


class Wanted(NamedTuple):
    """For what an estimate is made."""

    num_processes: int = 1
    sharding: str = "none"
    flops: float = 2e14


def take_estimate(words: Sequence[str]) -> tuple[Wanted | None, list[str]]:
    """
    What `--estimate [PROCESSES[:SHARDING[:FLOPS]]]` asks for, and the other words, which then need no GPU.

    Raises:
        UsageError: The value is something else.
    """
    words = list(words)
    if "--estimate" not in words:
        return None, words
    place = words.index("--estimate")
    value = "".join(words[place + 1 : place + 2])
    value = "" if value.startswith("-") else value
    rest = [*words[:place], *words[place + 1 + bool(value) :], "--use_cpu=true"]
    processes, _, sharding = value.partition(":")
    sharding, _, flops = sharding.partition(":")
    try:
        wanted = Wanted(int(processes or 1), sharding or "none", float(flops or Wanted().flops))
    except ValueError as error:
        raise UsageError(f"`estimate`: got {value!r}, expected such as 8:fsdp2 or 8:fsdp2:3e14.") from error
    if wanted.sharding not in _SHARDING or wanted.num_processes < 1 or wanted.flops <= 0:
        raise UsageError(f"`estimate`: got {value!r}, expected PROCESSES:SHARDING with {', '.join(_SHARDING)}.")
    return wanted, rest


def print_estimate(wanted: Wanted, training: IGPOConfig, model: ModelConfig) -> None:
    """Prints the estimate. Of the model only its configuration is read."""
    check_model(model, training)
    name = str(model.model_name_or_path)
    adapter = find_adapter(name, model.model_revision)
    config = AutoConfig.from_pretrained(
        base_of_adapter(adapter) if adapter else name,
        revision=None if adapter else model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    named = getattr(config, "dtype", None) if model.dtype == "auto" else getattr(torch, str(model.dtype), None)
    result = estimate(
        config,
        training,
        dtype=named or torch.float32,
        peft_config=get_peft_config(model),
        load_in_4bit=bool(model.load_in_4bit),
        **wanted._asdict(),
    )
    print("\n".join(result.lines()))
