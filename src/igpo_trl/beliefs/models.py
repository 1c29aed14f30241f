"""Which models can be scored against a KV cache, decided from their classes and configs."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

# transformers model types that a test compares with plain forwards, by how they use `config.sliding_window`:
# not at all, in every layer where it is set, or as `config.layer_types` says.
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
WINDOWED = {"ministral3", "mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"}
LAYERED = {
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

# Learned positions. The others have rotary positions, of which only differences matter, or none.
ABSOLUTE = {"gpt2"}

# Adapters that only change weights, so that a token's place in the row does not matter to them.
_ADAPTERS = {"ADALORA", "BOFT", "HRA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "RANDLORA", "VERA"}


def packed_obstacle(model: Any, longest: int | None = None) -> str | None:
    """
    Say why packed scoring may be inexact on this model.

    Packed scoring needs a cache that keeps every past token in every layer, a `position_ids` argument, and an
    attention that takes an arbitrary mask. A model that is not known to have all three is refused.

    Args:
        model (`nn.Module`): Causal language model, with or without wrappers.
        longest (`int`, *optional*): Tokens of the longest context with its probe. Some position embeddings change for
            all tokens of a sequence beyond some length, which a trunk may reach and a branch may not. Without
            `longest` they are refused.

    Returns:
        `str` or `None`: The reason, `None` if packed scoring is exact.
    """
    base = base_model(model)
    name = type(base).__name__
    missing = {"position_ids", cache_argument(base)} - parameters_of(type(base).forward)
    if missing:
        return f"{name}.forward takes no {', '.join(sorted(missing))}"
    config = base.config
    # FSDP2 replaces a module's class by one that torch derives from it.
    own = next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch."))
    if config.model_type not in FULL | WINDOWED | LAYERED or not own.__module__.startswith("transformers."):
        return f"{name} (model type {config.model_type!r}) is not among the tested models"
    unsupported = layer_kinds(config) - {"full_attention", "sliding_attention"}
    if unsupported:
        return f"{name} has layers that do not keep every past token ({', '.join(sorted(unsupported))})"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"{name} is configured for bidirectional attention"
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager", "flex_attention") and "flash" not in attention:
        return f"attention {attention!r} is unknown"
    return _adapter_obstacle(model) or _rope_obstacle(base, longest)


def cached_obstacle(model: nn.Module, offset: bool = False) -> str | None:
    """
    Say why probes must not be scored against the keys and values of another forward.

    Args:
        model (`nn.Module`): The model of that forward, in the train or eval mode that it ran in.
        offset (`bool`, *optional*, defaults to `False`): Whether that forward may have counted left padding as
            positions.

    Returns:
        `str` or `None`: The reason, `None` if they may be used.
    """
    base = base_model(model)
    if offset and base.config.model_type in ABSOLUTE:
        return "its positions are absolute, and padding was counted among them"
    if any(module.training and isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout was on"
    # Attention dropout is often a function call and not a module.
    config = base.config.get_text_config()
    functional = any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))
    return "dropout was on" if functional and base.training else None


def _adapter_obstacle(model: Any) -> str | None:
    for adapter in getattr(_unwrapped(model), "peft_config", {}).values():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind not in _ADAPTERS or getattr(adapter, "alora_invocation_tokens", None):
            return f"a {kind} adapter may treat a token differently depending on its place in the row"
    return None


def adds_virtual_tokens(model: Any) -> bool:
    """Whether a prompt-learning adapter puts tokens of its own before those of every row."""
    return bool(getattr(getattr(_unwrapped(model), "active_peft_config", None), "is_prompt_learning", False))


class ChangingPositions(NamedTuple):
    """Position embeddings of a kind that changes for all tokens of a sequence that is longer than `limit`."""

    kind: str
    limit: int

    def share(self, length: int, other: int) -> bool:
        """Whether sequences of these lengths have the same position embeddings, so that they may share a forward."""
        if max(length, other) <= self.limit or length == other:
            return True
        return self.kind == "longrope" and min(length, other) > self.limit


def changing_positions(model: Any) -> ChangingPositions | None:
    """The position embeddings of a model that change with the length of the sequence, `None` for all others."""
    found = []
    for module in _rotary(model):
        kinds = module.rope_type
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                parameters = module.config.rope_parameters
                limit = (parameters if layer is None else parameters[layer])["original_max_position_embeddings"]
                found.append(ChangingPositions(kind, limit))
            elif kind is not None and "dynamic" in kind:
                found.append(ChangingPositions(kind, module.original_max_seq_len))
    return min(found, key=lambda positions: (positions.kind == "longrope", positions.limit), default=None)


def forget_lengths(model: Any) -> None:
    """Undo what longer sequences have left in `dynamic` position embeddings, which keep the longest length so far."""
    for module in _rotary(model):
        kind = module.rope_type
        if isinstance(kind, str) and "dynamic" in kind and module.max_seq_len_cached > module.original_max_seq_len:
            module.inv_freq.copy_(module.original_inv_freq)
            module.max_seq_len_cached = module.original_max_seq_len


# Going through all modules of a model takes as long as one of its layers takes for a few tokens, so it is done once.
_ROTARY: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def _rotary(model: Any) -> list[Any]:
    """The modules that compute a model's rotary position embeddings."""
    base = base_model(model)
    if base not in _ROTARY:
        _ROTARY[base] = [module for module in base.modules() if getattr(module, "rope_type", None) is not None]
    return _ROTARY[base]


def _rope_obstacle(base: Any, longest: int | None) -> str | None:
    positions = changing_positions(base)
    if positions is None or (longest is not None and longest <= positions.limit):
        return None
    return (
        f"position embeddings of type {positions.kind!r} change for all tokens of a sequence longer than "
        f"{positions.limit}"
    )


@lru_cache(maxsize=64)
def parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments of the forward of a model's class."""
    return frozenset(inspect.signature(forward).parameters)


def cache_argument(model: Any) -> str:
    """What a model calls its KV cache: transformers 5.24 renamed `past_key_values` to `cache`."""
    return "cache" if "cache" in parameters_of(type(base_model(model)).forward) else "past_key_values"


def layer_kinds(config: Any) -> set[str]:
    """The attention kinds of a model's layers, `"full_attention"` and `"sliding_attention"` among them."""
    if config.model_type in LAYERED:
        return set(config.layer_types)
    windowed = config.model_type in WINDOWED and config.sliding_window is not None
    return {"sliding_attention" if windowed else "full_attention"}


def uncompiled(model: Any) -> Any:
    """The module inside `torch.compile`, which would compile again for the shapes of every batch."""
    return getattr(model, "_orig_mod", model)


def base_model(model: Any) -> Any:
    """The transformers model inside DDP, FSDP and PEFT wrappers."""
    inner: Any = _unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _unwrapped(model: Any) -> Any:
    return uncompiled(getattr(uncompiled(model), "module", uncompiled(model)))
