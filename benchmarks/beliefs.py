"""What the belief pass costs, in units of one plain causal forward of the same trajectories.

    python benchmarks/beliefs.py [--device cpu] [--contexts 8] [--tokens 1536] [--answer-tokens 16] [--shape 7M]
    python benchmarks/beliefs.py --device cuda    # 0.5B and 3B in bfloat16, 8k to 32k tokens, 10 to 200 turns

Compares, in turns and several times over:

- a plain forward of the trajectories;
- packed scoring: the trajectory once, then all probes against its cache;
- the probes alone, for which the keys and values of the rollout or of the old log-probabilities are available;
- one full forward per turn with the logits of every position, the usual implementation;
- `method="per_turn"`, which computes the logits of the answer only.

Prints medians, tokens run, the share of the plain forward's tokens per second, peak memory of the new tensors, medians
of the run-by-run ratios with their targets, and the difference between packed and per-turn scores. Anything slower
than a minute runs once. The weights are random, because only time and memory are measured.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler would write to the table

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igpo_trl.beliefs import AnswerProbe, score_beliefs
from igpo_trl.beliefs.branching import run_branches, run_trunk
from igpo_trl.beliefs.packing import Target

# Vocabulary, hidden size, MLP, layers, heads, key and value heads, tied embeddings: Qwen2 shapes.
SHAPES = {
    "7M": (4096, 256, 768, 7, 8, 2, False),
    "0.5B": (151936, 896, 4864, 24, 14, 2, True),
    "3B": (151936, 2048, 11008, 36, 16, 2, True),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shape": ["7M"], "tokens": [1536], "contexts": [8], "template_tokens": [0, 12], "repeats": 15},
    "cuda": {
        "shape": ["0.5B", "3B"],
        "tokens": [8192, 16384, 32768],
        "contexts": [10, 50, 200],
        "template_tokens": [12],
        "repeats": 5,
    },
}
PLAIN, PACKED, MARGINAL, USUAL, LEAN = (
    "plain forward",
    "packed",
    "probes alone",
    "per turn, as usual",
    "method='per_turn'",
)


def make_model(shape: str, device: str, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights and SDPA attention."""
    torch.manual_seed(0)
    vocabulary, hidden, mlp, layers, heads, groups, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        max_position_embeddings=65536,
        initializer_range=0.1,  # large, so that wrong scores would differ from right ones
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a trajectory")
    parser.add_argument("--contexts", type=int, nargs="+", help="turns, each with one belief")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument(
        "--template-tokens",
        type=int,
        nargs="+",
        help="template tokens before the answer; the paper's template has about 12",
    )
    parser.add_argument("--rollouts", type=int, default=1)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--shape", choices=SHAPES, nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on a CPU, bfloat16 elsewhere")
    args = parser.parse_args()

    for name, value in DEFAULTS["cpu" if args.device == "cpu" else "cuda"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name()
    for shape in args.shape:
        model = make_model(shape, args.device, dtype)
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {dtype}, {device}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}: {args.rollouts} trajectory, answers of "
            f"{args.answer_tokens} tokens, medians of {args.repeats} runs"
        )
        for tokens, contexts, template in itertools.product(args.tokens, args.contexts, args.template_tokens):
            compare(model, args, tokens, contexts, template)


def compare(
    model: Qwen2ForCausalLM, args: argparse.Namespace, num_tokens: int, num_contexts: int, template_tokens: int
) -> None:
    """Run all of them and print their table."""
    print(f"\n{num_tokens} tokens, {num_contexts} contexts, answers after {template_tokens} template tokens")
    functions = make_functions(model, args, num_tokens, num_contexts, template_tokens)
    tokens, memory = {}, {}
    for name, function in list(functions.items()):
        try:
            tokens[name], memory[name] = count_tokens(model, function), peak_memory(function, args.device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            del functions[name]
            torch.cuda.empty_cache()
    times = measure(functions, args.repeats, args.device)
    speed = {name: tokens[name] / statistics.median(values) for name, values in times.items()}
    print(f"{'':20}{'median ms':>11}{'x plain forward':>17}{'tokens run':>12}{'share of speed':>16}{'peak MB':>10}")
    for name, values in times.items():
        print(
            f"{name:20}{1e3 * statistics.median(values):11.1f}{ratio(values, times[PLAIN]):17.2f}{tokens[name]:12}"
            f"{speed[name] / speed[PLAIN]:16.0%}{memory[name] / 1e6:10.1f}"
        )
    # The targets are those of one case: 8 contexts, 1,536 tokens, answers of 16 tokens.
    aimed = (num_tokens, num_contexts, template_tokens, args.answer_tokens) == (1536, 8, 0, 16)
    for a, b, target in (
        (PACKED, PLAIN, "at most 1.25"),
        (MARGINAL, PLAIN, "at most 0.15"),
        (USUAL, PACKED, "at least 3.8"),
        (LEAN, PACKED, ""),
    ):
        if a in times:
            print(
                f"{a} : {b} = {ratio(times[a], times[b]):.2f}" + (f" (target: {target})" if aimed and target else "")
            )
    if LEAN in times:
        apart = max((a - b).abs().max().item() for a, b in zip(functions[PACKED](), functions[LEAN](), strict=True))
        print(f"largest difference between {PACKED} and {LEAN}: {apart:.1e} nats", flush=True)


def make_functions(
    model: Qwen2ForCausalLM, args: argparse.Namespace, num_tokens: int, num_contexts: int, template_tokens: int
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """What is compared, by name."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()

    sequences = [tokens(num_tokens) for _ in range(args.rollouts)]
    boundaries = [[num_tokens * (k + 1) // num_contexts for k in range(num_contexts)] for _ in sequences]
    probe = AnswerProbe(
        tokens(template_tokens + args.answer_tokens), template_tokens, template_tokens + args.answer_tokens
    )
    probes = [[probe] for _ in sequences]
    batch = torch.tensor(sequences, device=args.device)

    @torch.no_grad()
    def plain() -> list[torch.Tensor]:
        return [model(batch, use_cache=False, logits_to_keep=1).logits]

    # Without a template the first answer token is predicted by the context's last one, which is run again.
    runs = [
        [
            Target(bound - 1, [sequence[bound - 1], *probe.token_ids[:-1]], probe.token_ids, [])
            if template_tokens == 0
            else Target(bound, probe.token_ids[:-1], probe.token_ids[template_tokens:], [])
            for bound in bounds
        ]
        for sequence, bounds in zip(sequences, boundaries, strict=True)
    ]
    with torch.no_grad():
        trunk = run_trunk(model, sequences)

    @torch.no_grad()
    def marginal() -> list[torch.Tensor]:
        return [torch.tensor(run_branches(model, trunk, runs))]

    @torch.no_grad()
    def as_usually_written() -> list[torch.Tensor]:
        scores = []
        for sequence, bounds in zip(sequences, boundaries, strict=True):
            for bound in bounds:
                ids = torch.tensor([sequence[:bound] + probe.token_ids], device=args.device)
                labels = ids[:, -args.answer_tokens :]
                log_probs = model(ids, use_cache=False).logits[:, -args.answer_tokens - 1 : -1].log_softmax(-1)
                scores.append(log_probs.gather(-1, labels[..., None]).mean())
        return scores

    score = partial(score_beliefs, model, sequences, boundaries, probes)
    return {
        PLAIN: plain,
        PACKED: partial(score, method="packed", tokens_per_batch=max(16384, args.rollouts * num_tokens)),
        MARGINAL: marginal,
        USUAL: as_usually_written,
        # One context at a time: in a batch of different lengths, padding would make it slower still.
        LEAN: partial(score, method="per_turn", batch_size=1),
    }


def count_tokens(model: Qwen2ForCausalLM, function: Callable[[], object]) -> int:
    """Tokens that go through the model."""
    counts: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counts.append(ids[0].numel()))
    function()
    handle.remove()
    return sum(counts)


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Most bytes that the function's tensors hold at a time, beside what was there before."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocated = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def measure(functions: dict[str, Callable], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function, run in turn so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(repeats + 1):
        for name, function in functions.items():
            if times[name] and times[name][0] > 60:
                continue
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if run or seconds > 60:  # the first round warms up
                times[name].append(seconds)
    return times


def ratio(values: list[float], base: list[float]) -> float:
    """Median of the run-by-run ratios."""
    if len(values) != len(base):  # one of them was run once
        return statistics.median(values) / statistics.median(base)
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


if __name__ == "__main__":
    main()
