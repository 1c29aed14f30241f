"""Which models can branch off their KV cache, told from their classes and configs."""

import inspect
from typing import Any

# Model types of transformers that a test has compared with plain forwards, by how they use `config.sliding_window`.
FULL = {
    "apertus",
    "arcee",
    "cohere",
    "ernie4_5",
    "gemma",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "phi",
    "seed_oss",
    "stablelm",
}
WINDOWED = {"ministral3", "mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"}  # every layer, where it is set
LAYERED = {  # as `config.layer_types` says
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "ministral",
    "olmo3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "smollm3",
}

# Those with learned positions; the others have rotary ones, which see differences alone, or none.
ABSOLUTE = {"gpt2"}

# Adapters that change the weights and nothing else: the same for a token wherever it stands in the row.
_ADAPTERS = {"ADALORA", "BOFT", "HRA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "RANDLORA", "VERA"}
# Attention implementations that take an arbitrary mask.
TAKE_MASKS = ("sdpa", "eager")


def branching_obstacle(model: Any, longest: int | None = None) -> str | None:
    """
    Why branches off a trunk would not be exact on this model, or `None` where they are.

    Anything not known to be safe is refused.

    Args:
        model (`Any`): causal language model, wrapped or not.
        longest (`int`, *optional*): tokens of the longest sequence. Some position embeddings change for all tokens
            beyond some length, which the trunk may pass and a branch may not; not given, those are refused.
    """
    base = base_model(model)
    name = type(base).__name__
    missing = {"position_ids", "past_key_values"} - set(inspect.signature(type(base).forward).parameters)
    if missing:
        return f"{name}.forward takes no {', '.join(sorted(missing))}"
    config = base.config
    # FSDP2 gives a module a class that torch derives from the module's own.
    own = next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch."))
    if config.model_type not in FULL | WINDOWED | LAYERED or not own.__module__.startswith("transformers."):
        return f"{name} (model type {config.model_type!r}) is not among the models that this was tested with"
    odd = layer_kinds(config) - {"full_attention", "sliding_attention"}
    if odd:
        return f"{name} has layers that do not keep every past token ({', '.join(sorted(odd))})"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"{name} is configured to look ahead"
    attention = config._attn_implementation
    if attention not in TAKE_MASKS and "flash" not in attention and attention != "flex_attention":
        return f"attention {attention!r} is unknown"
    return _adapter_obstacle(model) or _rope_obstacle(base, longest)


def _adapter_obstacle(model: Any) -> str | None:
    for adapter in getattr(_unwrapped(model), "peft_config", {}).values():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind not in _ADAPTERS or getattr(adapter, "alora_invocation_tokens", None):
            return f"a {kind} adapter is not known to treat a token alike wherever it stands in the row"
    return None


def _rope_obstacle(base: Any, longest: int | None) -> str | None:
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind is None or not ("dynamic" in kind or kind == "longrope"):
                continue
            parameters = getattr(base.config, "rope_parameters", None) or {}
            limit = parameters.get("original_max_position_embeddings") or base.config.max_position_embeddings
            if longest is None or longest > limit:
                return f"position embeddings of type {kind!r} change for all tokens of a sequence longer than {limit}"
    return None


def layer_kinds(config: Any) -> set[str]:
    if config.model_type in LAYERED:
        return set(config.layer_types)
    windowed = config.model_type in WINDOWED and config.sliding_window is not None
    return {"sliding_attention" if windowed else "full_attention"}


def uncompiled(model: Any) -> Any:
    """The module behind `torch.compile`, whose graphs would be made anew for the shapes of every batch."""
    return getattr(model, "_orig_mod", model)


def base_model(model: Any) -> Any:
    """The transformers model inside DDP, FSDP and PEFT wrappers."""
    inner: Any = _unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _unwrapped(model: Any) -> Any:
    return uncompiled(getattr(uncompiled(model), "module", uncompiled(model)))
