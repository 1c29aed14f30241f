"""The cost of a rollout, compared with TRL's tool loop in the same run.

(a) slow tool: one round with one call per rollout, without sampling;
(b) generation: trajectories of several turns on the transformers backend, greedy, the same tokens from both loops;
(c) overhead: like (a), with an instant tool;
(d) concurrency, only if asked for: what it would bring to decode at most so many rollouts at a time, from the measured
    seconds of a decoding step and simulated rollouts.

    python benchmarks/rollouts.py [--only concurrency]
"""

import argparse
import copy
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def make_both(tool: Callable[[str], str], max_concurrent: int, **options: Any) -> list[Any]:
    """TRL's trainer and ours, with the same model and options, in evaluation mode."""
    import tiny
    from trl import GRPOConfig, GRPOTrainer

    from igpo_trl import IGPOConfig, IGPOTrainer

    model = options.pop("model", None) or tiny.make_model()
    trainers = []
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (IGPOTrainer, IGPOConfig)):
        ours = {"max_concurrent_tool_calls": max_concurrent} if config_class is IGPOConfig else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = tiny.make_trainer(
                trainer_class,
                config_class,
                tempfile.mkdtemp(),
                model=copy.deepcopy(model),
                tools=[tool],
                max_completion_length=100_000,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                **ours,
                **options,
            )
        trainer.model.config.max_position_embeddings = 1_000_000
        trainer.model.eval()
        trainers.append(trainer)
    return trainers


def generate(trainer: Any, num_rollouts: int) -> tuple[float, Any]:
    """Seconds and result of one generation batch."""
    prompts = [[{"role": "user", "content": f"Question {i}?"}] for i in range(num_rollouts)]
    trainer._sync_tool_dicts = [{tool.__name__: tool for tool in trainer.tools} for _ in prompts]
    trainer._async_tool_dicts = [{} for _ in prompts]
    started = time.perf_counter()
    with torch.no_grad():
        result = trainer._generate(prompts)
    return time.perf_counter() - started, result


def round_seconds(latency: float, num_rollouts: int, rounds: int, repeats: int) -> list[float]:
    """Median seconds of a round with TRL's loop and with ours. Sampling is replaced by a constant turn."""

    def search(query: str) -> str:
        """
        Searches.

        Args:
            query: What to look for.
        """
        if latency:
            time.sleep(latency)
        return f"You asked: {query}. " + "Paris is the capital of France. " * 6

    medians = []
    for trainer in make_both(search, max_concurrent=num_rollouts):
        end = trainer._tokenizer.eos_token_id
        call = '<tool_call>\n{"name": "search", "arguments": {"query": "where was the author born"}}\n</tool_call>'
        call_ids, answer_ids = ([*trainer._tokenizer.encode(text), end] for text in (call, "<answer>Paris</answer>"))

        def batch(num_rounds: int, trainer: Any = trainer, turns: Any = (call_ids, answer_ids)) -> float:
            said = iter([turns[0]] * num_rounds + [turns[1]])

            def say(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
                turn = next(said)
                return [list(turn) for _ in prompt_ids], None

            with mock.patch.object(trainer, "_generate_single_turn", say):
                return generate(trainer, num_rollouts)[0]

        batch(1)  # warms up: threads, schemas, caches of templates
        # The difference to a batch without calls is the cost of the rounds.
        medians.append(statistics.median((batch(rounds) - batch(0)) / rounds for _ in range(repeats)))
    return medians


def every_turn_calls(turns: int) -> Any:
    """A parser that takes all turns but the last for calls, because a random model writes none."""

    def parse(tokenizer: Any, ids: Any, prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        found = re.findall(r"turn (\d+)", tokenizer.decode(prefix[-600:]))
        turn = int(found[-1]) + 1 if found else 1
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if turn < turns:
            function = {"name": "search", "arguments": {"query": f"{sum(ids) % 97} turn {turn}"}}
            message["tool_calls"] = [{"type": "function", "function": function}]
        return message

    return parse


def generation_seconds(num_rollouts: int, turns: int, sampled: int, observed: int, repeats: int) -> list[list[float]]:
    """Seconds to generate whole trajectories with TRL's loop and with ours. Exits if the tokens differ."""
    import tiny

    words = "Paris is the capital of France. "

    def search(query: str) -> str:
        """
        Searches.

        Args:
            query: What to look for.
        """
        return words * round(observed / len(tokenizer.encode(words))) + query

    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(
        "qwen2", vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.05,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    print(f"    {type(model).__name__}, {parameters / 1e6:.1f} million parameters", flush=True)
    length = {"max_new_tokens": sampled, "min_new_tokens": sampled, "do_sample": False, "top_k": None}
    trainers = make_both(search, max_concurrent=num_rollouts, model=model, generation_kwargs=length)
    seconds: list[list[float]] = [[], []]
    with ExitStack() as stack:
        for module in ("trl.trainer.grpo_trainer", "igpo_trl.rollout.loop"):
            stack.enter_context(mock.patch(f"{module}.parse_response", every_turn_calls(turns)))
        for _ in range(repeats):
            tokens = []
            for trainer, taken in zip(trainers, seconds, strict=True):
                duration, result = generate(trainer, num_rollouts)
                taken.append(duration)
                tokens.append(result[:3])
            if tokens[0] != tokens[1]:
                raise SystemExit("The two loops sampled different tokens.")
    spans = [[len(run) for run in "".join(map(str, mask)).split("1") if run] for mask in tokens[1][2]]
    mean = statistics.fmean(length for row in spans for length in row)
    print(
        f"    {turns} turns of {sampled} sampled tokens, observations of {mean:.0f} tokens: the same ids", flush=True
    )
    return seconds


BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32), (500, 1000, 1500)
TURNS: dict[str, Callable[[random.Random], int]] = {
    "2 to 8": lambda rng: rng.randint(2, 8),
    "mostly 3": lambda rng: rng.choices([2, 3, 4, 5, 6, 8], [10, 60, 15, 7, 5, 3])[0],
}
SAMPLED: dict[str, Callable[[random.Random], int]] = {
    "20 to 60": lambda rng: rng.randint(20, 60),
    "up to 512": lambda rng: min(512, max(8, round(rng.lognormvariate(3.7, 0.9)))),  # median 40, mean 60
}


def measure_decoding(repeats: int) -> tuple[dict[int, Any], float]:
    """CPU seconds of a decoding step with a KV cache: per batch a line over the context; and of an observed token."""
    import numpy as np
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    print(f"    Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, float32", flush=True)

    def seconds(batch: int, cached: int, new: int, sampled: int) -> float:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(*torch.randn(2, batch, config.num_key_value_heads, cached, config.head_dim), layer)
        ids = torch.ones(batch, cached + new, dtype=torch.long)
        started = time.process_time()
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=sampled)
        return time.process_time() - started

    lines = {}
    for batch in BATCHES:
        row = []
        for context in CONTEXTS:
            values = [seconds(batch, context, 1, 9) - seconds(batch, context, 1, 1) for _ in range(repeats)]
            row.append(statistics.median(values) / 8)
        lines[batch] = np.polyfit(CONTEXTS, row, 1)
        print(f"    {batch:2} rows: {' '.join(f'{1000 * value:6.0f}' for value in row)} ms a step", flush=True)
    return lines, statistics.median(seconds(8, 1000, 301, 1) - seconds(8, 1000, 1, 1) for _ in range(repeats)) / 2400


def simulate(
    rollouts: Sequence[Sequence[tuple[int, int]]],
    step: Callable[[int, float], float],
    observing: float,
    limit: int,
    refill: bool = False,
    piece: int = 10**6,
) -> tuple[float, int, int]:
    """
    Seconds, decoding steps and the largest cache (in tokens) of rollouts of which at most `limit` are active.

    A rollout is a list of turns: tokens observed before it, tokens sampled. Others start when all active ones have
    ended, or, with `refill`, in every round. Rows whose turn has ended are dropped every `piece` tokens.
    """
    waiting, seconds, steps, peak = list(rollouts), 0.0, 0, 0
    active: list[tuple[int, Sequence[tuple[int, int]]]] = []  # length, turns that are left
    while waiting or active:
        if refill or not active:
            room = limit - len(active)
            active += [(0, turns) for turns in waiting[:room]]
            waiting = waiting[room:]
        seconds += len(active) * max(turns[0][0] for _, turns in active) * observing  # short observations are padded
        active = [(length + turns[0][0], turns) for length, turns in active]
        widest, sampled, done = max(length for length, _ in active), [turns[0][1] for _, turns in active], 0
        while done < max(sampled):
            new = min(piece, max(sampled) - done)
            seconds += new * step(sum(length > done for length in sampled), widest + done + new / 2)
            done += new
        steps += done
        peak = max(peak, len(active) * (widest + done))
        active = [(length + turns[0][1], turns[1:]) for length, turns in active if len(turns) > 1]
    return seconds, steps, peak


def compare_schedules(num_rollouts: int, samples: int, repeats: int) -> None:
    """Print what all rollouts at once, one part after another, and refilled batches take."""
    import numpy as np

    torch.set_num_threads(1)
    lines, observing = measure_decoding(repeats)
    print(f"    {1000 * observing:.1f} ms per observed token", flush=True)

    def step(batch: int, context: float) -> float:
        return float(np.interp(batch, BATCHES, [np.polyval(lines[size], context) for size in BATCHES]))

    print(f"    {num_rollouts} rollouts: seconds · decoding steps · thousand tokens of the largest cache")
    for turns, num_turns in TURNS.items():
        for lengths, num_sampled in SAMPLED.items():
            rng = random.Random(0)
            batches = [
                [
                    [
                        (rng.randint(100, 600) if turn else rng.randint(200, 400), num_sampled(rng))
                        for turn in range(num_turns(rng))
                    ]
                    for _ in range(num_rollouts)
                ]
                for _ in range(samples)
            ]
            for name, options in {
                "all at once": {"limit": num_rollouts},
                "all, rows leave every 64 tokens": {"limit": num_rollouts, "piece": 64},
                **{f"{limit} after {limit}": {"limit": limit} for limit in (16, 8)},
                **{f"{limit}, refilled": {"limit": limit, "refill": True} for limit in (16, 8)},
            }.items():
                mean = np.mean([simulate(batch, step, observing, **options) for batch in batches], axis=0)
                label = f"{turns} turns of {lengths}, {name}"
                print(f"    {label:60} {mean[0]:7.0f} s {mean[1]:6.0f} {mean[2] / 1000:6.0f}k", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=128, help="of (a) and (c)")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of one call in (a)")
    parser.add_argument("--generation-rollouts", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--sampled", type=int, default=24, help="tokens of a turn in (b)")
    parser.add_argument("--observed", type=int, default=200, help="tokens of an observation in (b)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["concurrency"])
    args = parser.parse_args()
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if args.only:
        print("(d) decoding on one thread, and simulated rollouts", flush=True)
        return compare_schedules(num_rollouts=32, samples=20, repeats=args.repeats)

    print(f"(a) {args.rollouts} rollouts, {args.latency} s per call, without sampling", flush=True)
    theirs, ours = round_seconds(args.latency, args.rollouts, rounds=2, repeats=args.repeats)
    print(f"    seconds per round: TRL {theirs:.3f}, ours {ours:.3f}")
    print(f"    TRL : ours = {theirs / ours:.1f} (target: at least 20)")

    print(f"(b) generation of {args.generation_rollouts} rollouts on {torch.get_num_threads()} threads", flush=True)
    seconds = generation_seconds(args.generation_rollouts, args.turns, args.sampled, args.observed, args.repeats)
    medians = [statistics.median(taken) for taken in seconds]
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    print(
        f"    seconds: TRL {medians[0]:.1f}, ours {medians[1]:.1f}; ratio of each run {[round(r, 2) for r in ratios]}"
    )
    print(f"    TRL : ours = {statistics.median(ratios):.2f} (target: at least 3)")

    print(f"(c) {args.rollouts} rollouts, an instant tool", flush=True)
    theirs, ours = round_seconds(0.0, args.rollouts, rounds=4, repeats=2 * args.repeats + 1)
    print(f"    milliseconds per round: TRL {1000 * theirs:.1f}, ours {1000 * ours:.1f}")
    print(f"    TRL : ours = {theirs / ours:.2f} (target: at least 1)")


if __name__ == "__main__":
    main()
