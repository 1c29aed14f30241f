"""
Training in the sandbox, with `GRPOTrainer` and `IGPOTrainer` through their ordinary interfaces.

Both get the same model, questions and budget, and their rollout loops make the same rollouts. The methods differ in
[`METHODS`] alone.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ..config import IGPOConfig
from ..rewards import make_answer_reward
from ..trainer import IGPOTrainer
from ..trajectory import write_jsonl
from .evaluate import Scores, roll_out, to_trajectories
from .model import ANSWER_TEMPLATE, make_tokenizer
from .world import MAX_SEARCHES, SearchEnvironment, make_dataset

#: What each method changes, apart from the KL weight: options of `GRPOConfig`, or of `IGPOConfig` if `igpo` is true.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"igpo": False, "scale_rewards": "group"},
    "grpo_batch": {"igpo": False, "scale_rewards": "batch"},
    "igpo_separate": {"igpo": True, "normalization": "separate"},
    "igpo_critic": {"igpo": True, "normalization": "critic"},
}
LABELS = {
    "grpo": "GRPO",
    "grpo_batch": "GRPO batch std",
    "igpo_separate": "IGPO separate",
    "igpo_critic": "IGPO critic",
}

# A turn is a call of 6 tokens or an answer of 5; a whole rollout is 4 calls, 4 passages of 12 and an answer.
_TURN_TOKENS = 8
_COMPLETION_TOKENS = MAX_SEARCHES * (_TURN_TOKENS + 12) + _TURN_TOKENS


@dataclass(frozen=True)
class Budget:
    """
    How much to train and to evaluate.

    Args:
        steps (`int`): Optimizer steps.
        questions (`int`): Questions per step.
        rollouts (`int`): Rollouts per question.
        learning_rate (`float`): Constant over training.
        eval_every (`int`): Steps between two points of the learning curve.
        curve_questions (`int`): Held-out questions per point of the learning curve, answered greedily.
    """

    steps: int = 120
    questions: int = 16
    rollouts: int = 8
    learning_rate: float = 5e-4
    eval_every: int = 10
    curve_questions: int = 128


@dataclass
class TrainingRun:
    """
    Measurements of one training run.

    Args:
        method (`str`): Key of [`METHODS`].
        beta (`float`): Weight of the KL term.
        curve (`dict[int, Scores]`): Greedy held-out scores by step, from step 0.
        collapse (`list[float]`): Per step, the share of groups whose rollouts all have the same outcome.
        reward (`list[float]`): Per step, the mean outcome.
        seconds (`float`): Wall time of the training, without evaluations.
    """

    method: str
    beta: float
    curve: dict[int, Scores] = field(default_factory=dict)
    collapse: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def area(self) -> float:
        """Mean greedy EM over training: the area under the curve by trapezoids, divided by the steps."""
        steps = sorted(self.curve)
        pairs = list(zip(steps, steps[1:], strict=False))
        total = sum((b - a) * (self.curve[a].em + self.curve[b].em) / 2 for a, b in pairs)
        return total / (steps[-1] - steps[0]) if pairs else self.curve[steps[0]].em


class SandboxGRPOTrainer(GRPOTrainer):
    """
    TRL's trainer with the parent's rollouts, which also records outcomes and passes each scored batch to `sink`.

    It caches the token ids of tool results, because TRL renders two conversations for each and the sandbox has few
    different ones.
    """

    run: TrainingRun
    sink: Callable[[list[dict[str, Any]], dict[str, Any]], None] | None = None

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, str]]) -> list[int]:
        cache: dict[Any, list[int]] = self.__dict__.setdefault("_suffixes", {})
        key = tuple((message["name"], message["content"]) for message in tool_messages)
        if key not in cache:
            cache[key] = super()._get_tool_suffix_ids(tool_messages)
        return list(cache[key])

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            groups = rewards.sum(dim=1).view(-1, self.num_generations)
            self.run.reward.append(groups.mean().item())
            self.run.collapse.append((groups.amax(dim=1) == groups.amin(dim=1)).float().mean().item())
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if self.sink is not None:
            self.sink(inputs, output)
        return output


class SandboxIGPOTrainer(SandboxGRPOTrainer, IGPOTrainer):
    """`IGPOTrainer` with the same additions."""


class _CurveCallback(TrainerCallback):
    """Adds a point to the learning curve every few steps, and shows the latest values in the progress bar."""

    def __init__(self, every: int, measure: Callable[[], Scores], run: TrainingRun, bar: Any):
        self.every, self.measure, self.run, self.bar = every, measure, run, bar
        self.seconds = 0.0

    def _add_point(self, step: int) -> None:
        started = time.perf_counter()
        self.run.curve[step] = self.measure()
        self.seconds += time.perf_counter() - started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add_point(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._add_point(state.global_step)
        scores = self.run.curve[max(self.run.curve)]
        values = {"reward": f"{self.run.reward[-1]:.2f}", "held_out_em": f"{scores.em:.2f}"}
        self.bar.set_postfix(values, searches=f"{scores.searches:.1f}", refresh=False)
        self.bar.update()


def make_trainer(
    method: str,
    model_path: Path,
    output_dir: Path,
    *,
    beta: float = 0.0,
    budget: Budget | None = None,
    seed: int = 0,
    data_seed: int = 1,
    save_trajectories: bool = False,
    **options: Any,
) -> SandboxGRPOTrainer:
    """
    Makes the trainer of a method, with the arguments that a user would pass.

    Args:
        method (`str`): Key of [`METHODS`].
        model_path (`Path`): Directory of the warm-started model.
        output_dir (`Path`): Directory for trajectories. Nothing else is written.
        beta (`float`, *optional*, defaults to `0.0`): Weight of the KL term to the warm-started model.
        budget ([`Budget`], *optional*): Steps, questions, rollouts and learning rate. Defaults to `Budget()`.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.
        data_seed (`int`, *optional*, defaults to `1`): Seed of the training worlds.
        save_trajectories (`bool`, *optional*, defaults to `False`): Write every training rollout to
            `output_dir/trajectories`.
        **options: Further options of the method's configuration.
    """
    budget = budget or Budget()
    options = METHODS[method] | options
    is_igpo = options.pop("igpo")
    if is_igpo:
        options = {"on_malformed_tool_call": "end"} | options  # as in TRL's loop
        options |= {"answer_template": ANSWER_TEMPLATE, "save_trajectories": save_trajectories}
    config_class = IGPOConfig if is_igpo else GRPOConfig
    args = config_class(output_dir=str(output_dir), beta=beta, seed=seed, **_training_options(budget), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*environment_factory.*experimental", category=UserWarning)
        trainer = (SandboxIGPOTrainer if is_igpo else SandboxGRPOTrainer)(
            model=AutoModelForCausalLM.from_pretrained(model_path),
            reward_funcs=make_answer_reward(format_penalty=0.0),
            args=args,
            train_dataset=make_dataset(data_seed, budget.steps * budget.questions),
            processing_class=make_tokenizer(),
            environment_factory=SearchEnvironment,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.run = TrainingRun(method, beta)
    if save_trajectories and not is_igpo:  # IGPOTrainer writes its own, with beliefs and advantages
        trainer.sink = partial(_write_trajectories, trainer, output_dir / "trajectories" / "rank0.jsonl")
    return trainer


def _training_options(budget: Budget) -> dict[str, Any]:
    """Options that all methods share."""
    batch = budget.questions * budget.rollouts
    return {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "num_generations": budget.rollouts,
        "num_generations_eval": 1,
        "max_steps": budget.steps,
        "learning_rate": budget.learning_rate,
        "lr_scheduler_type": "constant",
        "max_completion_length": _COMPLETION_TOKENS,
        "generation_kwargs": {"max_new_tokens": _TURN_TOKENS},
        "max_tool_calling_iterations": MAX_SEARCHES,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _write_trajectories(
    trainer: SandboxGRPOTrainer, path: Path, inputs: list[dict[str, Any]], output: dict[str, Any]
) -> None:
    if trainer.model.training:
        records = to_trajectories(trainer, inputs, output)
        for i, record in enumerate(records):
            record.step, record.group = trainer.state.global_step, i // trainer.num_generations
        write_jsonl(path, records, append=True)


def train_with_curve(
    trainer: SandboxGRPOTrainer, budget: Budget, curve_seed: int, description: str = ""
) -> TrainingRun:
    """
    Trains, and measures a learning curve of greedy scores on held-out questions.

    Args:
        trainer ([`SandboxGRPOTrainer`]): Trainer from [`make_trainer`].
        budget ([`Budget`]): The budget that the trainer was made with.
        curve_seed (`int`): Seed of the held-out worlds of the curve.
        description (`str`, *optional*): Label of the progress bar. Defaults to the method's.
    """
    questions = list(make_dataset(curve_seed, budget.curve_questions))
    run = trainer.run
    with tqdm(total=budget.steps, desc=description or LABELS[run.method], unit="step") as bar:
        curve = _CurveCallback(budget.eval_every, lambda: Scores.of(roll_out(trainer, questions)), run, bar)
        trainer.add_callback(curve)
        started = time.perf_counter()
        trainer.train()
        run.seconds = time.perf_counter() - started - curve.seconds
    return run
