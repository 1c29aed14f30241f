"""Where the time and the memory of a training step go, with TRL's `GRPOTrainer`, with `IGPOTrainer`, and at the least.

    python benchmarks/step_time.py [--quick] [--layers 0] [--parts training step memory sandbox recording]
    python benchmarks/step_time.py --device cuda --dtype bfloat16 --model qwen2.5-3b --rollouts 16

training: forward and backward over given rollouts, next to the floor: the same model over the real tokens alone, each
    rollout attending to itself only, with the output head at sampled tokens only. "equal" are rollouts nearly all of
    two searches; "mixed" are rollouts of 2 to 8 turns.
step: a whole step by parts. Both trainers run their own rollout loops and sample the same scripted tokens: a logits
    processor leaves one token at each place, so that prefill and decoding cost what they do.
memory: peak of one rollout with a long completion and a vocabulary of 152k, above weights and gradients.
sandbox: a whole step of the sandbox by parts, and the time that beliefs add to it.
recording: training over the rollouts of `igpo tiny-model` and `train.py --config configs/hotpotqa_cpu.yaml`, if they
    are there.

Cases run in turns; seconds are medians and ratios are medians of the rounds' ratios. Weights are random. On a CPU the
default is a part of the layers, in which the output head weighs more than in the model; `--layers 0` runs all.
"""

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from scripted import (
    WIDEST,
    Rollout,
    Script,
    describe,
    equal_rollouts,
    make_batch,
    mixed_rollouts,
    recorded_rollouts,
    scripted,
    tiny,
)

# Family and sizes: vocabulary, width, width of the MLP, layers, heads, heads of keys.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "smollm2-135m": ("llama", (49152, 576, 1536, 30, 9, 3)),
    "smollm2-360m": ("llama", (49152, 960, 2560, 32, 15, 5)),
    "qwen2.5-0.5b": ("qwen2", (151936, 896, 4864, 24, 14, 2)),
    "qwen2.5-3b": ("qwen2", (151936, 2048, 11008, 36, 16, 2)),
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
PARTS = (
    "rollout: prefill", "rollout: decode", "rollout: tools and waiting", "rollout: rest", "beliefs",
    "old and reference log-probs", "training forward", "training backward", "optimizer", "rewards, logging, rest",
)  # fmt: skip
PREFILL, DECODE, TOOLS, ROLLOUT, BELIEFS, LOG_PROBS, FORWARD, BACKWARD, OPTIMIZER, REST = PARTS
TRL, OURS = "GRPOTrainer", "IGPOTrainer"


# ------------------------------------------------------------------------------------------------------------- measure


class Parts(NamedTuple):
    """What was measured, by part."""

    seconds: Counter[str]
    tokens: Counter[str]
    head_tokens: Counter[str]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Clock:
    """Seconds and tokens of named parts. What runs inside another part counts as the inner one alone."""

    def __init__(self, device: str, cpu_time: bool):
        self.now = time.process_time if cpu_time else time.perf_counter
        self._device = device
        self._stack: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.seconds, self.tokens, self.head_tokens = self.parts = Parts(Counter(), Counter(), Counter())

    @property
    def top(self) -> str:
        return self._stack[-1] if self._stack else ""

    def push(self, part: str) -> None:
        self._count()
        self._stack.append(part)

    def pop(self) -> None:
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = self.now()
        if self._stack:
            self.seconds[self.top] += now - self._since
        self._since = now

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        self.push(part)
        try:
            yield
        finally:
            self.pop()

    def wrap(self, owner: Any, name: str, part: str, unless: str = "") -> None:
        """Count calls of a method as a part, except inside another."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if unless and self.top == unless:
                return method(*args, **kwargs)
            with self.part(part):
                return method(*args, **kwargs)

        setattr(owner, name, timed)


def with_tools(parts: Parts, calls: Sequence[tuple[float, float]]) -> Parts:
    """The parts, with the time in which a tool ran told apart from the rest of the rollout."""
    end = 0.0
    for first, last in sorted(calls):
        parts.seconds[TOOLS] += max(0.0, last - max(first, end))
        end = max(end, last)
    parts.seconds[ROLLOUT] -= parts.seconds[TOOLS]
    return parts


def watch(trainer: Any, clock: Clock) -> None:
    """Count the parts of a trainer's step."""
    for name, part in (("_generate", ROLLOUT), ("_compute_loss", FORWARD)):
        clock.wrap(trainer, name, part)
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", LOG_PROBS, unless=FORWARD)
    clock.wrap(trainer.accelerator, "backward", BACKWARD)
    clock.wrap(trainer.accelerator, "clip_grad_norm_", OPTIMIZER)
    clock.wrap(trainer.model, "generate", DECODE)
    if (scorer := getattr(trainer, "_belief_scorer", None)) is not None:
        for name in ("score", "score_cached"):
            clock.wrap(scorer, name, BELIEFS)

    prefills = []

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        prefills.append(clock.top in (ROLLOUT, DECODE) and kwargs["input_ids"].shape[1] > 1)
        if prefills[-1]:
            clock.push(PREFILL)

    def end(*args: Any) -> None:
        if prefills.pop():
            clock.pop()

    def count(module: Any, args: Any, kwargs: Any) -> None:
        clock.tokens[clock.top] += kwargs["input_ids"].numel()

    trainer.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.model.register_forward_pre_hook(begin, with_kwargs=True)
    trainer.model.register_forward_hook(end, always_call=True)


@contextmanager
def head_counted(clock: Clock) -> Iterator[None]:
    """Count the hidden states that reach TRL's chunked output head."""
    import trl.trainer.utils

    head = trl.trainer.utils._ChunkedLogProbFunction
    apply = head.apply

    def counted(hidden: torch.Tensor, *args: Any) -> Any:
        clock.head_tokens[clock.top] += len(hidden)
        return apply(hidden, *args)

    with mock.patch.object(head, "apply", counted):
        yield


def median_of(results: Sequence[Parts], what: str, part: str) -> float:
    return statistics.median(getattr(result, what)[part] for result in results)


def totals(results: Sequence[Parts]) -> list[float]:
    return [result.total for result in results]


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, str]:
    """The median of the rounds' ratios, and all of them."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), "rounds: " + " ".join(f"{value:.2f}" for value in ratios)


class Targets:
    """What was measured against what was aimed at."""

    lines: list[str] = []

    @classmethod
    def add(cls, what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        met = value >= at_least if at_least is not None else value <= (at_most or 0.0)
        aim = f"at least {at_least}" if at_least is not None else f"at most {at_most}"
        cls.lines.append(f"{what:66}{value:8.3f}   {aim:14} {'met' if met else 'MISSED'}")
        print(cls.lines[-1], flush=True)


# -------------------------------------------------------------------------------------------------------------- models


def make_model(args: argparse.Namespace, name: str) -> Any:
    family, sizes = SHAPES[name]
    shape: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
    shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
    if family == "llama":
        shape["head_dim"] = None
    if args.attention:
        shape["attn_implementation"] = args.attention
    model = tiny.make_model(
        family, **shape, max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.02
    )
    return model.to(device=args.device, dtype=getattr(torch, args.dtype))


def name_of(model: Any, args: argparse.Namespace) -> str:
    config, number = model.config, sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__} of {config.num_hidden_layers} layers, {number / 1e6:.0f} M parameters, {args.dtype}"
    )


def make_trainer(name: str, args: argparse.Namespace, model: Any, number: int, **options: Any) -> Any:
    """One of the two trainers, whose optimizer step is of `number` rollouts, on a copy of the model."""
    from trl import GRPOConfig, GRPOTrainer

    from igpo_trl import IGPOConfig, IGPOTrainer

    trainer_class, config_class = (IGPOTrainer, IGPOConfig) if name == OURS else (GRPOTrainer, GRPOConfig)
    trainer = tiny.make_trainer(
        trainer_class,
        config_class,
        tempfile.mkdtemp(),
        **{
            "model": copy.deepcopy(model),
            "per_device_train_batch_size": args.microbatch,
            "gradient_accumulation_steps": number // args.microbatch,
            "max_completion_length": WIDEST,
            "use_cpu": args.device == "cpu",
            "learning_rate": 1e-6,
            "reward_funcs": lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        }
        | options,
    )
    # Otherwise `train` would do this, without which training steps are measured as well.
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


# ------------------------------------------------------------------------------------------------------- training part


def train_on(trainer: Any, batch: dict[str, Any], clock: Clock) -> Parts:
    """Forwards and backwards of one optimizer step over a generation batch, by the trainer's own `training_step`."""
    torch.manual_seed(0)  # the parent shuffles
    trainer._generate_and_score_completions = lambda inputs: dict(batch)
    trainer.current_gradient_accumulation_steps = accumulation = trainer.args.gradient_accumulation_steps
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.model.train()
    clock.reset()
    with clock.part(REST):
        for _ in range(accumulation):
            trainer.training_step(trainer.model, [], None)
    trainer.model.zero_grad()
    return clock.parts


def train_at_floor(model: Any, rollouts: Sequence[Rollout], size: int, packed: bool, clock: Clock) -> Parts:
    """The same over real tokens alone: `size` rollouts in one row, or each in a row of its own."""
    generator, vocab_size = torch.Generator().manual_seed(0), model.config.vocab_size
    ordered = sorted(rollouts, key=lambda r: r.prompt + len(r.mask), reverse=True)
    size = size if packed else 1
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    total = sum(sum(rollout.mask) for rollout in rollouts)
    model.train()
    clock.reset()
    for batch in batches:
        with clock.part(FORWARD):
            lengths = [rollout.prompt + len(rollout.mask) for rollout in batch]
            ids = torch.randint(5, vocab_size - 1, (1, sum(lengths)), generator=generator).to(model.device)
            positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
            sampled = torch.cat([torch.tensor([0] * r.prompt + r.mask) for r in batch]).to(model.device)
            places = sampled.nonzero()[:, 0]

            def select(module: Any, args: Any, output: Any, places: torch.Tensor = places) -> Any:
                output.last_hidden_state = output.last_hidden_state[:, places - 1]
                return output

            hook = model.base_model.register_forward_hook(select)
            labels = ids[:, places]
            extra = {"position_ids": positions} if packed else {}
            output = model(input_ids=ids, shift_labels=labels, fused_lm_head=True, **extra)
            hook.remove()
            loss = -(output.log_probs.exp() / output.log_probs.detach().exp()).sum() / total
        with clock.part(BACKWARD):
            loss.backward()
    model.zero_grad()
    return clock.parts


def training_part(
    title: str, args: argparse.Namespace, model: Any, rollouts: Sequence[Rollout], target: float | None
) -> None:
    trainers = {name: make_trainer(name, args, model, len(rollouts)) for name in (TRL, OURS)}
    clock = Clock(args.device, args.cpu_time)
    vocab_size = model.config.vocab_size
    batches = {name: make_batch(rollouts, vocab_size, args.device, name == OURS) for name in trainers}
    short = {name: [Rollout(20, (4,), ())] * len(rollouts) for name in trainers}
    floors = {"floor, one row each": False}
    if args.device == "cuda":  # without FlashAttention a packed row has a mask of its length squared
        floors["floor, packed"] = True
    results: dict[str, list[Any]] = {name: [] for name in [*trainers, *floors]}
    with head_counted(clock):
        for name, trainer in trainers.items():
            watch(trainer, clock)
            train_on(trainer, make_batch(short[name], vocab_size, args.device, name == OURS), clock)  # warms up
        for _ in range(args.repeats):
            for name, trainer in trainers.items():
                results[name].append(train_on(trainer, batches[name], clock))
            for name, packed in floors.items():
                results[name].append(train_at_floor(trainers[OURS].model, rollouts, args.microbatch, packed, clock))
    floor = min(floors, key=lambda name: statistics.median(totals(results[name])))
    real = sum(rollout.prompt + len(rollout.mask) for rollout in rollouts)
    sampled = sum(sum(rollout.mask) for rollout in rollouts)
    print(f"\nTraining part, {title}: {name_of(model, args)}\n{describe(rollouts)}, microbatches of {args.microbatch}")
    print(f"{'':24}{'forward':>10}{'backward':>10}{'rest':>8}{'sum, s':>10}{'tokens':>10}{': real':>8}{'head':>9}")
    for name, values in results.items():
        seconds = [median_of(values, "seconds", part) for part in (FORWARD, BACKWARD, REST)]
        tokens, head = (median_of(values, what, FORWARD) for what in ("tokens", "head_tokens"))
        print(
            f"{name:24}{seconds[0]:10.2f}{seconds[1]:10.2f}{seconds[2]:8.2f}"
            f"{statistics.median(totals(values)):10.2f}{tokens:10.0f}{tokens / real:8.2f}{head:9.0f}"
        )
    print(f"{'in the rollouts':62}{real:10}{'':8}{sampled:9}")
    theirs, ours, least = (totals(results[name]) for name in (TRL, OURS, floor))
    for over, under, name, bound in (
        (theirs, ours, "TRL : ours", {"at_least": target}),
        (ours, least, "ours : floor", {"at_most": 1.25}),
    ):
        value, rounds = ratio(over, under)
        print(f"{name} = {value:.2f} ({rounds})")
        if None not in bound.values():
            Targets.add(f"training part, {title}: {name}", value, **bound)
    computed = median_of(results[OURS], "tokens", FORWARD) / real
    Targets.add(f"training part, {title}: computed : real tokens", computed, at_most=1.10)


# ---------------------------------------------------------------------------------------------------------- whole step


def steps_of(trainer: Any, clock: Clock) -> list[Parts]:
    """Train, and return the parts of every optimizer step."""
    from transformers import PrinterCallback, TrainerCallback

    steps: list[Parts] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.reset()
            clock.push(REST)

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clock.push(OPTIMIZER)

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clock.pop()

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            if clock.top:  # the summary at the end is no step
                clock.pop()
                steps.append(clock.parts)

    trainer.add_callback(Watch())
    trainer.remove_callback(PrinterCallback)
    watch(trainer, clock)
    with head_counted(clock):
        trainer.train()
    return steps


def by_batch(steps: Sequence[Parts], iterations: int) -> list[Parts]:
    """The optimizer steps of each generation batch together."""
    batches = [steps[i : i + iterations] for i in range(0, len(steps), iterations)]
    return [Parts(*(sum(counters, Counter()) for counters in zip(*batch, strict=True))) for batch in batches]


def print_parts(results: dict[str, list[Parts]], real: float | None = None) -> None:
    print(f"{'':30}" + "".join(f"{name + ', s':>18}{'%':>6}{'tokens':>9}" for name in results))
    sums = {name: statistics.median(totals(values)) for name, values in results.items()}
    for part in PARTS:
        line = f"{part:30}"
        for name, values in results.items():
            seconds, tokens = (median_of(values, what, part) for what in ("seconds", "tokens"))
            line += f"{seconds:18.3f}{seconds / sums[name]:6.1%}{tokens:9.0f}"
        print(line)
    print(f"{'whole step':30}" + "".join(f"{value:18.3f}{'':15}" for value in sums.values()))
    if real is not None:
        print(f"tokens of the rollouts: {real}")


def whole_step(args: argparse.Namespace, model: Any, rollouts: Sequence[Rollout]) -> None:
    from datasets import Dataset

    results: dict[str, list[Any]] = {TRL: [], OURS: []}
    for _ in range(args.repeats):
        samples = {}
        for name in results:
            clock = Clock(args.device, args.cpu_time)
            script = Script(rollouts, 2, args.latency, clock.now)
            answers = [["the city of Paris"]] * len(script.prompts)
            trainer = make_trainer(
                name, args, model, len(rollouts), max_steps=2 * args.iterations, num_iterations=args.iterations,
                tools=[script.search], processing_class=script.tokenizer, shuffle_dataset=False,
                train_dataset=Dataset.from_dict({"prompt": script.prompts, "answers": answers}),
                max_tool_calling_iterations=20, generation_kwargs={"max_new_tokens": 64},
            )  # fmt: skip
            taken: list[Any] = []
            scripted(trainer, script, taken)
            _, step = by_batch(steps_of(trainer, clock), args.iterations)
            results[name].append(with_tools(step, script.calls))
            samples[name] = taken[1]
            del trainer
            gc.collect()
        if samples[TRL] != samples[OURS]:
            raise SystemExit("The two loops made different rollouts.")
    prompts, completions, masks = samples[OURS]
    real = sum(map(len, prompts)) + sum(map(len, completions))
    print(f"\nWhole step, mixed: {name_of(model, args)}\n{describe(rollouts)}, microbatches of {args.microbatch}")
    print(f"both trainers made the same rollouts; {args.latency} s per tool call")
    print_parts(results, real)
    value, rounds = ratio(*(totals(results[name]) for name in (TRL, OURS)))
    print(f"TRL : ours = {value:.2f} ({rounds})")
    trained = ([p.seconds[FORWARD] + p.seconds[BACKWARD] for p in results[name]] for name in (TRL, OURS))
    Targets.add("training part of a whole step, mixed: TRL : ours", ratio(*trained)[0], at_least=1.6)
    Targets.add("whole step, mixed: TRL : ours", value, at_least=1.5)
    shares = [result.seconds[BELIEFS] / result.total for result in results[OURS]]
    Targets.add("whole step, mixed: belief share", statistics.median(shares), at_most=0.03)


# -------------------------------------------------------------------------------------------------------------- memory


LONG = Rollout(300, (90,) * 9, ((WIDEST - 9 * 90) // 8,) * 8)


def peak_memory(name: str, args: argparse.Namespace) -> None:
    """Print the bytes that one training step of a long rollout needs above weights and gradients."""
    args.microbatch, vocab_size = 2, SHAPES["qwen2.5-0.5b"][1][0]
    trainer = make_trainer(name, args, make_model(args, "qwen2.5-0.5b"), 2)
    trainer.current_gradient_accumulation_steps = 1
    trainer._generate_and_score_completions = lambda inputs: dict(batch)

    def step() -> None:
        trainer._step, trainer._buffered_inputs = 0, None
        trainer.training_step(trainer.model, [], None)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    batch = make_batch([Rollout(20, (4,), ())], vocab_size, args.device, name == OURS)
    step()  # the gradients stay
    batch = make_batch([LONG], vocab_size, args.device, name == OURS)
    gc.collect()
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    before, peak, done = resident(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    step()
    done.set()
    sampler.join()
    print(peak[0] - before)


def memory(args: argparse.Namespace) -> None:
    layers = args.layers or (4 if args.device == "cpu" else None)
    peaks = {}
    for name in (TRL, OURS):
        command = [sys.executable, __file__, "--peak-of", name, "--device", args.device, "--dtype", args.dtype]
        command += ["--layers", str(layers)] if layers else []
        command += ["--attention", args.attention] if args.attention else []
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = int(result.stdout.splitlines()[-1]) / 2**20
    print(
        f"\nPeak memory of one rollout of {LONG.prompt + len(LONG.mask)} tokens above weights and gradients, "
        f"qwen2.5-0.5b{f' with {layers} layers' if layers else ''}, {args.dtype}, gradient checkpointing:\n"
        + ", ".join(f"{name} {value:.0f} MiB" for name, value in peaks.items())
    )
    Targets.add("peak memory: ours : TRL", peaks[OURS] / peaks[TRL], at_most=0.5)


# ----------------------------------------------------------------------------------------------- sandbox and recording

IGPO = "igpo_separate"
UNWEIGHTED = {"info_gain_weight": 0.0, "pad_to_longest": False}  # GRPO without padding, as IGPO is trained
OLD_LOG_PROBS = {"reuse_prefixes": False, "num_iterations": 2}
# Method of the sandbox, its options, and whether beliefs are scored against separate forwards.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "GRPO, TRL's loop": ("grpo", {}, False),
    "GRPO, our loop": (IGPO, UNWEIGHTED, False),
    "IGPO, rollout's cache": (IGPO, {}, False),
    "IGPO, separate forwards": (IGPO, {}, True),
    "GRPO, our loop, old log-probs": (IGPO, UNWEIGHTED | OLD_LOG_PROBS, False),
    "IGPO, forward of old log-probs": (IGPO, OLD_LOG_PROBS, False),
}
COMPARED = {
    "IGPO, rollout's cache": "GRPO, our loop",
    "IGPO, separate forwards": "GRPO, our loop",
    "IGPO, forward of old log-probs": "GRPO, our loop, old log-probs",
}
WARM_UP = 2


def sandbox_steps(case: str, model: Path, number: int, seed: int, cpu_time: bool) -> list[Parts]:
    """The parts of each generation batch with its optimizer steps."""
    from igpo_trl.beliefs.scorer import BeliefScorer
    from igpo_trl.sandbox.train import Budget, make_trainer

    method, options, separate_forwards = CASES[case]
    iterations = options.get("num_iterations", 1)
    can = BeliefScorer.can_use_cache
    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(steps=number * iterations)
        trainer = make_trainer(method, model, Path(folder), budget=budget, seed=seed, data_seed=seed + 1, **options)
        with mock.patch.object(BeliefScorer, "can_use_cache", lambda *a, **k: not separate_forwards and can(*a, **k)):
            steps = steps_of(trainer, Clock("cpu", cpu_time))
    return by_batch(steps, iterations)[WARM_UP:]


def sandbox(args: argparse.Namespace) -> None:
    from igpo_trl.sandbox.warm_start import warm_start

    model = warm_start()
    results: dict[str, list[Any]] = {case: [] for case in CASES}
    by_round: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(args.rounds):
        for case in CASES:
            steps = sandbox_steps(case, model, args.steps, 100 * number, args.cpu_time)
            results[case] += steps
            by_round[case].append(statistics.median(totals(steps)))
    print(f"\nSandbox, 128 rollouts a batch, {args.rounds} runs of {args.steps} batches")
    print_parts({name: results[case] for name, case in ((TRL, "GRPO, TRL's loop"), (OURS, "IGPO, rollout's cache"))})
    print(f"\n{'':32}{'ms a batch':>12}{'belief ms':>11}{'share':>8}{'x GRPO':>8}  of the runs")
    for case, steps in results.items():
        line = f"{case:32}{1e3 * statistics.median(totals(steps)):12.0f}"
        if grpo := COMPARED.get(case):
            beliefs = [step.seconds[BELIEFS] for step in steps]
            share, _ = ratio(beliefs, totals(steps))
            value, rounds = ratio(by_round[case], by_round[grpo])
            line += f"{1e3 * statistics.median(beliefs):11.0f}{share:8.1%}{value:8.2f}  {rounds}"
            if case == "IGPO, rollout's cache":
                target = share
        print(line)
    Targets.add("sandbox: belief share", target, at_most=0.03)


def recording(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (args.recording.exists() and args.recording_model.exists()):
        print(f"\nRecording: skipped, there is no {args.recording} with {args.recording_model}")
        return
    tokenizer = AutoTokenizer.from_pretrained(args.recording_model)
    model = AutoModelForCausalLM.from_pretrained(args.recording_model).to(args.device, getattr(torch, args.dtype))
    training_part("recorded HotpotQA", args, model, recorded_rollouts(args.recording, tokenizer, 16), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_parts = ("training", "step", "memory", "sandbox", "recording")
    parser.add_argument("--parts", nargs="+", choices=all_parts, default=all_parts)
    parser.add_argument("--shapes", nargs="+", choices=("equal", "mixed"), default=("equal", "mixed"))
    parser.add_argument("--quick", action="store_true", help="two layers and a short sandbox: a look")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attention", help="attention implementation of the model")
    parser.add_argument("--model", default="smollm2-135m", choices=SHAPES, help="its sizes; weights are random")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has; default: 6 on a CPU, 0 is all")
    parser.add_argument("--rollouts", type=int, help="default: 4 on a CPU, else 32; a multiple of --microbatch")
    parser.add_argument("--microbatch", type=int, help="default: 2 on a CPU, else 4")
    parser.add_argument("--repeats", type=int, help="rounds of the training part and of the whole step")
    parser.add_argument("--iterations", type=int, default=1, help="of the whole step; 2 need old log-probabilities")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a tool call in the whole step")
    parser.add_argument("--steps", type=int, help="generation batches of a run in the sandbox")
    parser.add_argument("--rounds", type=int, help="how often each case of the sandbox is run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, on a busy machine; waiting is not seen")
    parser.add_argument("--recording", type=Path, default=Path("outputs/hotpotqa-cpu/trajectories/rank0.jsonl"))
    parser.add_argument("--recording-model", type=Path, default=Path("outputs/tiny-model"))
    parser.add_argument("--peak-of", choices=(TRL, OURS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    on_cpu = args.device == "cpu"
    for name, value in {
        "layers": 2 if args.quick else 6 if on_cpu else 0,
        "rollouts": 4 if on_cpu else 32,
        "microbatch": 2 if on_cpu else 4,
        "repeats": 1 if on_cpu else 3,
        "steps": 4 if args.quick else 8,
        "rounds": 1 if args.quick else 2,
    }.items():
        if getattr(args, name) is None and not (args.peak_of and name == "layers"):
            setattr(args, name, value)
    if args.peak_of:
        return peak_memory(args.peak_of, args)

    device = torch.cuda.get_device_name() if not on_cpu else f"CPU, {args.threads} thread(s)"
    print(f"{device}, torch {torch.__version__}; {'CPU' if args.cpu_time else 'wall'} seconds")
    shapes = {"equal": (equal_rollouts, 1.3), "mixed": (mixed_rollouts, 1.6)}
    model = make_model(args, args.model) if {"training", "step"} & set(args.parts) else None
    if "training" in args.parts:
        for title in args.shapes:
            make, target = shapes[title]
            training_part(title, args, model, make(args.rollouts), target)
    if "step" in args.parts:
        whole_step(args, model, mixed_rollouts(args.rollouts))
    del model
    if "memory" in args.parts:
        memory(args)
    if "recording" in args.parts:
        recording(args)
    if "sandbox" in args.parts:
        sandbox(args)
    print("\n" + "\n".join(Targets.lines))


if __name__ == "__main__":
    main()
