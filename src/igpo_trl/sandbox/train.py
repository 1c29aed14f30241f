"""
Training in the sandbox, with `GRPOTrainer` and `IGPOTrainer` through their ordinary interfaces.

Both get the same model, questions and budget, and their rollout loops make the same rollouts. The methods differ in
[`METHODS`] alone.
"""

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ..config import IGPOConfig
from ..rewards import make_answer_reward
from ..trainer import IGPOTrainer
from ..trajectory import write_jsonl
from .evaluate import Scores, roll_out, to_trajectories
from .model import ANSWER_TEMPLATE, make_tokenizer
from .world import DEFAULT_KIND, MAX_SEARCHES, SearchEnvironment, make_dataset

#: What each method changes, apart from the KL weight: options of `GRPOConfig`, or of `IGPOConfig` if `igpo` is true.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"igpo": False, "scale_rewards": "group"},
    "grpo_batch": {"igpo": False, "scale_rewards": "batch"},
    "igpo_paper": {"igpo": True, "recipe": "paper"},
    "igpo_separate": {"igpo": True, "normalization": "separate"},
    "igpo_returns": {"igpo": True, "normalization": "returns"},
    "igpo_critic": {"igpo": True, "normalization": "critic", "info_gain_weight": 1.0, "gae_lambda": 0.9},
    "igpo_critic_no_gain": {"igpo": True, "normalization": "critic", "info_gain_weight": 0.0, "gae_lambda": 0.9},
}
LABELS = {
    "grpo": "GRPO",
    "grpo_batch": "GRPO, batch std",
    "igpo_paper": "IGPO as published",
    "igpo_separate": "IGPO separate",
    "igpo_returns": "IGPO returns",
    "igpo_critic": "IGPO (default)",
    "igpo_critic_no_gain": "IGPO, weight 0",
}

# A turn is a call of 6 tokens or an answer of 5; a whole rollout is 4 calls, 4 passages of 12 and an answer.
_TURN_TOKENS = 8
_COMPLETION_TOKENS = MAX_SEARCHES * (_TURN_TOKENS + 12) + _TURN_TOKENS


@dataclass(frozen=True)
class Budget:
    """How much to train and to evaluate."""

    steps: int = 120
    questions: int = 16  # per step
    rollouts: int = 8  # per question
    learning_rate: float = 5e-4  # constant over training
    answer_metric: str = "f1"  # the outcome
    eval_every: int = 10  # steps between two points of the learning curve
    curve_questions: int = 128  # held-out questions per point, answered greedily


@dataclass
class TrainingRun:
    """Measurements of one training run."""

    method: str
    beta: float
    curve: dict[int, Scores] = field(default_factory=dict)  # greedy held-out scores by step, from step 0
    collapse: list[float] = field(default_factory=list)  # by step, share of groups in which all outcomes are the same
    reward: list[float] = field(default_factory=list)  # by step, the mean outcome
    seconds: float = 0.0  # wall time of the training, without evaluations

    @property
    def area(self) -> float:
        """Mean greedy EM over training: the area under the curve by trapezoids, divided by the steps."""
        steps = sorted(self.curve)
        pairs = list(zip(steps, steps[1:], strict=False))
        total = sum((b - a) * (self.curve[a].em + self.curve[b].em) / 2 for a, b in pairs)
        return total / (steps[-1] - steps[0]) if pairs else self.curve[steps[0]].em


class SandboxGRPOTrainer(GRPOTrainer):
    """TRL's trainer with TRL's rollouts. If `save_to` is set, it records them as [`IGPOTrainer`] does."""

    save_to: Path | None = None

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, str]]) -> list[int]:
        # TRL renders two conversations for each result of a tool, and the sandbox has few different results.
        cache: dict[Any, list[int]] = self.__dict__.setdefault("_suffixes", {})
        key = tuple((message["name"], message["content"]) for message in tool_messages)
        if key not in cache:
            cache[key] = super()._get_tool_suffix_ids(tool_messages)
        return list(cache[key])

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if self.save_to is not None and self.model.training:
            state = {"num_generations": self.num_generations, "optimizer_step": self.state.global_step}
            write_jsonl(self.save_to, to_trajectories(self, inputs, output, training=True, **state), append=True)
        return output


class _Measure(TrainerCallback):
    """Measures every step and a point of the learning curve every few, and shows the latest values in `bar`."""

    def __init__(self, trainer: GRPOTrainer, run: TrainingRun, questions: list[Any], every: int, bar: Any):
        self.trainer, self.run, self.questions, self.every, self.bar = trainer, run, questions, every, bar

    def _add_point(self, step: int) -> None:
        started = time.perf_counter()
        self.run.curve[step] = Scores.of(roll_out(self.trainer, self.questions))
        self.run.seconds -= time.perf_counter() - started  # evaluations do not count

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add_point(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (rewards,) = self.trainer._logs["rewards"].values()  # those of this step's rollouts, group by group
        groups = torch.tensor(rewards).view(-1, self.trainer.num_generations)
        self.run.reward.append(groups.mean().item())
        self.run.collapse.append((groups.amax(dim=1) == groups.amin(dim=1)).float().mean().item())
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
    kind: str = DEFAULT_KIND,
    save_trajectories: bool = False,
    **options: Any,
) -> GRPOTrainer:
    """
    Makes the trainer of a method, with the arguments that a user would pass.

    `beta` is the weight of the KL term to the warm-started model, `data_seed` the stream of the training worlds and
    `kind` their kind; `options` are further ones of the method's configuration. With `save_trajectories`, every
    training rollout is written to `output_dir/trajectories`. Nothing else is written.
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
        trainer = (IGPOTrainer if is_igpo else SandboxGRPOTrainer)(
            model=AutoModelForCausalLM.from_pretrained(model_path),
            reward_funcs=make_answer_reward(format_penalty=0.0, metric=budget.answer_metric),
            args=args,
            train_dataset=make_dataset(data_seed, budget.steps * budget.questions, kind=kind),
            processing_class=make_tokenizer(),
            environment_factory=SearchEnvironment,
        )
    trainer.remove_callback(PrinterCallback)
    if save_trajectories and not is_igpo:
        trainer.save_to = output_dir / "trajectories" / "rank0.jsonl"
    return trainer


def _training_options(budget: Budget) -> dict[str, Any]:
    """Options that all methods share."""
    batch = budget.questions * budget.rollouts
    return {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": max(batch, budget.curve_questions),
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


def train_with_curve(
    trainer: GRPOTrainer,
    method: str,
    budget: Budget,
    curve_seed: int,
    description: str = "",
    kind: str = DEFAULT_KIND,
) -> TrainingRun:
    """Trains, and measures a learning curve of greedy scores on held-out questions of the stream `curve_seed`."""
    questions = list(make_dataset(curve_seed, budget.curve_questions, kind=kind))
    run = TrainingRun(method, trainer.args.beta)
    with tqdm(total=budget.steps, desc=description or LABELS[method], unit="step") as bar:
        trainer.add_callback(_Measure(trainer, run, questions, budget.eval_every, bar))
        started = time.perf_counter()
        trainer.train()
        run.seconds += time.perf_counter() - started
    return run
