"""What the belief pass costs, in units of one plain causal forward of the same trajectories.

    python benchmarks/beliefs.py [--contexts 8] [--tokens 1536] [--answer-tokens 16] [--device cpu]

Times, in turn and several times over: a plain forward of the trajectories, packed scoring (the trajectory once, then
all probes against its cache), one forward per context, and the same as it is usually written, with the logits of every
position. Prints medians, the median of the run-by-run ratios, and how far packed and per-turn scores are apart. The
model has random weights: only time is measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igpo_trl.beliefs import AnswerProbe, score_beliefs


def make_model(device: str) -> Qwen2ForCausalLM:
    """A Qwen2 shape of 7 million parameters, float32, SDPA attention."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config).to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1536, help="tokens of a trajectory")
    parser.add_argument("--contexts", type=int, default=8, help="turns, each with one belief")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument(
        "--template-tokens",
        type=int,
        nargs="+",
        default=[0, 12],
        help="template tokens before the answer, one table for each; the paper's template has about 12",
    )
    parser.add_argument("--rollouts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = make_model(args.device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{size:.1f} M parameters, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{args.rollouts} trajectory of {args.tokens} tokens, {args.contexts} contexts, answers of "
        f"{args.answer_tokens} tokens, {args.repeats} runs"
    )
    for template_tokens in args.template_tokens:
        compare(model, args, template_tokens)


def compare(model: Qwen2ForCausalLM, args: argparse.Namespace, template_tokens: int) -> None:
    """Time the three and print their table."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 4096, (count,), generator=generator).tolist()

    sequences = [tokens(args.tokens) for _ in range(args.rollouts)]
    boundaries = [[args.tokens * (k + 1) // args.contexts for k in range(args.contexts)] for _ in sequences]
    length = template_tokens + args.answer_tokens
    probes = [[AnswerProbe(tokens(length), template_tokens, length)] for _ in sequences]
    batch = torch.tensor(sequences, device=args.device)

    def plain() -> None:
        with torch.no_grad():
            model(batch, use_cache=False, logits_to_keep=1)

    def packed() -> list[torch.Tensor]:
        return score_beliefs(model, sequences, boundaries, probes, method="packed", batch_size=args.rollouts)

    def per_turn() -> list[torch.Tensor]:
        # One context at a time: in a batch of different lengths, padding would make it slower still.
        return score_beliefs(model, sequences, boundaries, probes, method="per_turn", batch_size=1)

    def as_usually_written() -> None:
        # One forward per context that keeps the logits of every position, without a word of scoring code around it.
        with torch.no_grad():
            for sequence, bounds, (probe,) in zip(sequences, boundaries, probes, strict=True):
                for bound in bounds:
                    ids = torch.tensor([sequence[:bound] + probe.token_ids], device=args.device)
                    labels = ids[:, -args.answer_tokens :]
                    log_probs = model(ids, use_cache=False).logits[:, -args.answer_tokens - 1 : -1].log_softmax(-1)
                    log_probs.gather(-1, labels[..., None]).mean()

    functions = {"plain": plain, "packed": packed, "per turn": per_turn, "per turn, all logits": as_usually_written}
    times = measure(functions, args.repeats, args.device)
    apart = max((a - b).abs().max().item() for a, b in zip(packed(), per_turn(), strict=True))

    print(f"\nAnswers behind {template_tokens} template tokens")
    print(f"{'':22}{'median ms':>12}{'× plain forward':>18}")
    for name, values in times.items():
        print(f"{name:22}{1e3 * statistics.median(values):12.1f}{ratio(values, times['plain']):18.2f}")
    print(f"packed : plain    = {ratio(times['packed'], times['plain']):.2f}   (target at most 1.30)")
    print(f"per turn : packed = {ratio(times['per turn'], times['packed']):.2f}   (target at least 3.50)")
    print(f"all logits : packed = {ratio(times['per turn, all logits'], times['packed']):.2f}")
    print(f"largest difference between packed and per turn: {apart:.1e} nats")


def measure(functions: dict[str, Callable], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function, run in turn so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if run:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def ratio(values: list[float], base: list[float]) -> float:
    """Median of the run-by-run ratios."""
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


if __name__ == "__main__":
    main()
