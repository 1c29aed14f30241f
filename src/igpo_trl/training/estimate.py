"""
What a training needs, without loading a model: memory by kind, and a rough time per step.

The forward and backward of one microbatch are run on tensors without data, so activations are those of the model's own
code, with activation checkpointing and adapters. Everything else is arithmetic on shapes. Not included: the CUDA
context (about half a gigabyte), fragmentation, and the buffers in which processes exchange gradients.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import AttentionInterface

#: What is assumed of a turn, where nothing limits it.
TOKENS_PER_TURN, PROMPT_TOKENS = 100, 600


class PeakBytes(TorchDispatchMode):
    """
    Counts the bytes of all tensors that operations make while it is active: `now`, and at most, `peak`.

    Views of tensors in `known` are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass
class Estimate:
    """
    What one process needs.

    Attributes:
        memory (`dict[str, float]`): bytes by kind. Those of `resident` are held all the time; of the others, a phase
            holds its own.
        seconds (`dict[str, float]`): of an optimizer step, by part.
        assumptions (list of `str`): what the numbers stand on.
    """

    memory: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    resident = ("weights", "optimizer", "reference model")
    phases = {
        "generation": ("KV caches", "sampling"),
        "belief pass": ("belief pass",),
        "loss": ("gradients", "activations and logits"),
    }

    @property
    def peak(self) -> dict[str, float]:
        """Bytes at the peak of each phase."""
        held = sum(self.memory.get(kind, 0.0) for kind in self.resident)
        return {
            phase: held + sum(self.memory.get(kind, 0.0) for kind in kinds) for phase, kinds in self.phases.items()
        }

    def lines(self) -> list[str]:
        """The estimate for people."""
        rows = [f"  {kind:<24}{size / 2**30:8.2f} GiB" for kind, size in self.memory.items() if size]
        rows += ["Peak of a process:"]
        rows += [f"  {phase:<24}{size / 2**30:8.2f} GiB" for phase, size in self.peak.items()]
        rows += ["Time of an optimizer step, roughly:"]
        rows += [f"  {part:<24}{seconds:8.1f} s" for part, seconds in self.seconds.items()]
        rows += [f"  {'together':<24}{sum(self.seconds.values()):8.1f} s", "Assumed:"]
        return ["Memory of a process (an estimate, nothing was run):", *rows, *(f"  {a}" for a in self.assumptions)]


def estimate(
    config: Any,
    args: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    peft_config: Any = None,
    load_in_4bit: bool = False,
    num_processes: int = 1,
    sharding: str = "none",
    flops: float = 2e14,
    bandwidth: float = 1.5e12,
    prompt_tokens: int = PROMPT_TOKENS,
    sampled_tokens: int | None = None,
) -> Estimate:
    """
    Estimate memory and time of a training, with every rollout as long as `max_completion_length` allows.

    Args:
        config (`PretrainedConfig`): of the model.
        args ([`IGPOConfig`]): of the training.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of the weights. An adapter is float32.
        peft_config (`PeftConfig`, *optional*): of the adapter that is trained.
        load_in_4bit (`bool`, *optional*, defaults to `False`): weights of linear layers take 4 bits and a scale.
        num_processes (`int`, *optional*, defaults to 1): processes, each with an accelerator.
        sharding (`str`, *optional*, defaults to `"none"`): `none`, `zero2`, `zero3` or `fsdp2`.
        flops (`float`, *optional*): floating-point operations per second that a process attains.
        bandwidth (`float`, *optional*): bytes per second that it reads.
        prompt_tokens (`int`, *optional*): of a prompt.
        sampled_tokens (`int`, *optional*): of a rollout that the policy samples; the rest are observations.
    """
    text = config.get_text_config()
    size = torch.finfo(dtype).bits // 8
    completion = args.max_completion_length
    turns = args.max_turns or 5
    if sampled_tokens is None:
        sampled_tokens = min(completion, turns * min(TOKENS_PER_TURN, args.max_turn_length or TOKENS_PER_TURN))
    tokens = prompt_tokens + completion
    micro = args.per_device_train_batch_size
    rollouts = micro * args.steps_per_generation
    per_step = micro * args.gradient_accumulation_steps
    # A group's prompt is one copy, if the rows of a microbatch are of one group.
    one_group = args.num_generations % micro == 0
    row_tokens = (micro * tokens - (micro - 1) * prompt_tokens) if one_group else micro * tokens
    with plain_attention():
        model, shapes = _make_model(config, dtype, peft_config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # on `meta`, attention would be that of no device
        _base(model).tie_weights()
        trained = [p for p in model.parameters() if p.requires_grad]
        activations = _peak_of_microbatch(
            model, row_tokens, micro * sampled_tokens, bool(args.gradient_checkpointing), bool(args.bf16)
        )
        forward_token = _bytes_of_a_token(model)
        trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weights = float(sum(count * each for _, count, each in shapes))
    if load_in_4bit:  # 4 bits, and a scale of 8 bits for 64 weights
        weights = sum(count * ((4 + 8 / 64) / 8 if linear else float(each)) for linear, count, each in shapes)
    count = sum(number for _, number, _ in shapes)
    whole, part = 1.0, 1.0 / num_processes
    reference = weights if args.beta and peft_config is None else 0.0
    memory = {
        "weights": weights * (part if sharding in ("zero3", "fsdp2") else whole),
        "gradients": trained_bytes * (whole if sharding == "none" else part),
        "optimizer": 2 * trained_bytes * (whole if sharding == "none" else part),
        "reference model": reference * (part if sharding in ("zero3", "fsdp2") else whole),
    }
    layers, heads = text.num_hidden_layers, getattr(text, "num_key_value_heads", text.num_attention_heads)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_token = 2 * layers * heads * head_size * size
    logits = text.vocab_size * 4
    # Attention with a mask repeats keys and values for all its heads, one layer at a time.
    caches, repeats = float(rollouts * tokens * kv_token), text.num_attention_heads / heads
    layer, repeated = caches / layers, caches / layers * repeats * (repeats > 1)
    if not args.use_vllm:
        memory["KV caches"] = caches
        # A layer while it is gathered. Then what is read at a time (the last tool results, or all that came before),
        # or logits in float32 and their copies while sampling.
        read = (
            rollouts * (completion - sampled_tokens) / max(1, turns - 1) if args.reuse_prefixes else rollouts * tokens
        )
        sampling = max(rollouts * logits * 3.0, read * forward_token)
        memory["sampling"] = layer + repeated * args.reuse_prefixes + sampling
    if args.uses_beliefs:
        # A chunk of contexts with a cache of its own.
        memory["belief pass"] = min(args.belief_tokens_per_batch, rollouts * tokens) * (kv_token + forward_token)
        if not args.use_vllm and args.reuse_prefixes and sharding not in ("zero3", "fsdp2"):
            # Only in the first batch, when the optimizer holds nothing yet. Later against the rollouts' caches, of
            # which layers are copied.
            first = memory["belief pass"] - memory["optimizer"]
            memory["belief pass"] = max(first, caches + 2 * layer + repeated)
    memory["activations and logits"] = float(activations)

    backward = 4 if args.gradient_checkpointing else 3
    if peft_config is not None:
        backward -= 1  # frozen weights have no gradients
    forwards = backward * args.num_iterations + (1 if args.num_iterations > 1 or args.use_vllm else 0)
    forwards += bool(args.beta)
    token_flops, rows = 2.0 * count, per_step * (tokens if not one_group else completion + prompt_tokens / micro)
    attention = 4.0 * layers * text.num_attention_heads * head_size * tokens / 2
    per_token = token_flops + attention
    batches = per_step / rollouts
    seconds = {
        "prefill": per_step * completion * per_token / flops,
        "sampling": batches * sampled_tokens * (weights + rollouts * tokens / 2 * kv_token) / bandwidth,
        "loss": rows * per_token * forwards / flops,
    }
    if args.uses_beliefs:
        seconds["belief pass"] = per_step * turns * 24 * per_token / flops
    result = Estimate(memory, seconds)
    result.assumptions = [
        f"{count / 1e9:.2f} billion parameters, {sum(p.numel() for p in trained) / 1e6:.1f} million trained",
        f"prompts of {prompt_tokens} tokens, completions of {completion}, {sampled_tokens} of them sampled",
        f"{rollouts} rollouts at a time, {per_step * num_processes} a step; {num_processes} process(es), {sharding}",
        f"{flops:.1e} operations and {bandwidth:.1e} bytes a second per process",
    ]
    if args.use_vllm:
        share = f"{args.vllm_gpu_memory_utilization:.0%} of this GPU" if args.vllm_mode == "colocate" else "other GPUs"
        result.assumptions.append(f"vLLM ({args.vllm_mode}) takes {share} besides, for its weights and KV caches")
    return result


def _make_model(config: Any, dtype: torch.dtype, peft_config: Any) -> tuple[Any, list[tuple[bool, int, int]]]:
    """A model without data, and (is of a linear layer, numbers, bytes of a number) of its parameters."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = _ATTENTION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    shapes = [(id(p) in linear, p.numel(), p.element_size()) for p in model.parameters()]
    add_fused_lm_head(model)
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
        _base(model).enable_input_require_grads()
    return model, shapes


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _peak_of_microbatch(model: Any, tokens: int, scored: int, checkpointing: bool, bf16: bool) -> int:
    """Most bytes of tensors during the forward and the backward, without the gradients of the parameters."""
    base = _base(model)
    model.train()
    if checkpointing:
        base.gradient_checkpointing_enable()

    def select(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, :scored]
        return output

    base.base_model.register_forward_hook(select)
    with PeakBytes(model.parameters()) as counted, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        output = model(
            input_ids=ids, position_ids=torch.arange(tokens)[None], shift_labels=ids[:, :scored], fused_lm_head=True
        )
        output.log_probs.mean().backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)
    return max(0, counted.peak - gradients)


def _bytes_of_a_token(model: Any, length: int = 256) -> float:
    """Most bytes that a forward without gradients takes, for each token."""
    peaks = []
    for tokens in (length, 2 * length):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.no_grad(), PeakBytes(model.parameters()) as counted:
            model(input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False, logits_to_keep=1)
        peaks.append(counted.peak)
    return (peaks[1] - peaks[0]) / length


_ATTENTION = "causal_without_mask"


@contextmanager
def plain_attention() -> Iterator[None]:
    """PyTorch's causal attention under a name of its own: transformers makes no mask of tokens × tokens for it."""

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_ATTENTION, attend)
    yield
