"""The adapter of a trainer: its reference model, and weights of 4 bits under it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..beliefs.branching import REARRANGES

# TRL's name for the frozen copy of an adapter that is the reference model.
_REFERENCE = "ref"
# Initializations of LoRA that move a part of the base model's weights into the adapter.
_SPLITTING = ("pissa", "olora", "loftq")
# The same with random numbers or data, so that loading an adapter does not split the base model's weights as before.
_NOT_REPEATED = ("pissa_niter", "corda", "lora_ga")


def _initialization(config: Any) -> str:
    return str(getattr(config, "init_lora_weights", True)).lower()


@contextmanager
def adapters_added_plainly(model: Any, peft_config: Any) -> Iterator[None]:
    """
    While it lasts, a copy of the model's adapter can be added without changing the base model's weights again.

    Raises:
        ValueError: What is saved of an adapter with this `peft_config` could not be loaded again.
    """
    if (kind := _initialization(peft_config)).startswith(_NOT_REPEATED):
        raise ValueError(
            f"`init_lora_weights={kind!r}` moves a part of the base model's weights into the adapter, by random "
            "numbers or by data: loading the saved adapter would move another part. Use 'pissa' or 'olora', or make a "
            "`PeftModel` yourself and save the rest of its base model too."
        )
    config: Any = getattr(model, "active_peft_config", None)
    own = getattr(config, "init_lora_weights", None)
    if own is not None:
        config.init_lora_weights = True
    try:
        yield
    finally:
        if own is not None:
            config.init_lora_weights = own


def prepare_adapter(trainer: Any, *, is_new: bool) -> None:
    """
    Make the adapter of a trainer, if it has one, start from its reference model, and keep the layout of 4-bit weights.

    The reference model is the base model, or a frozen copy of the adapter where that is not what training starts from:
    an adapter that is trained further, or one that has taken over a part of the base model's weights.
    """
    model, args = trainer.model, trainer.args
    _keep_4bit_layout(model)
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "An adapter with `alora_invocation_tokens` acts after the last of them only, so the loss would read "
            "log-probabilities of earlier turns that they were not sampled with. Use LoRA without them."
        )
    if config.peft_type == "PREFIX_TUNING" and args.gradient_checkpointing:
        raise ValueError(
            "Prefix tuning puts keys and values into the cache, which activation checkpointing does not use. Set "
            "`gradient_checkpointing=False`."
        )
    needed = args.beta or args.belief_model == "reference"
    if needed and _REFERENCE not in model.peft_config:
        if is_new and not _initialization(config).startswith(_SPLITTING):
            return
        with adapters_added_plainly(model, None):
            model.add_adapter(_REFERENCE, config)
    if _REFERENCE in model.peft_config:  # TRL has copied some kinds of weights only
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parts = name.split(".")
            copy = ".".join(_REFERENCE if part == model.active_adapter else part for part in parts)
            if copy != name and copy in parameters:
                with torch.no_grad():
                    parameters[copy].copy_(parameter)


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """The model that the adapter of this `PeftModel` started from, while it lasts."""
    if _REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter(_REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(active)


def _keep_4bit_layout(model: nn.Module) -> None:
    """
    Keep bitsandbytes from rearranging 4-bit weights for inference, which it does on some CPUs in eval mode.

    What it computes with them has no gradient, and they stay as they are in train mode.
    """
    for module in model.modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has rearranged this model's weights for inference on a CPU, so that no gradient passes "
                "them. Load the model anew, and do not run it in eval mode before the trainer has it."
            )
        if getattr(module, REARRANGES, False):
            setattr(module, REARRANGES, False)
