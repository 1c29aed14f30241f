"""Evaluation in the sandbox: rolls out with the trainer in evaluation mode, and scores the trajectories."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..beliefs import build_probes, reduce_aliases, score_beliefs
from ..records import trajectories_of
from ..rewards import exact_match, extract_answer, f1_score
from ..step import Step
from ..trajectory import Trajectory
from .model import ANSWER_TEMPLATE


@dataclass
class Scores:
    """Means over the rollouts of an evaluation."""

    em: float
    f1: float
    em_by_hops: dict[int, float]
    searches: float

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "Scores":
        """Scores of trajectories from [`roll_out`]."""
        info = [trajectory.info for trajectory in trajectories]
        hops = sorted({row["hops"] for row in info})
        return cls(
            em=_mean(row["em"] for row in info),
            f1=_mean(row["f1"] for row in info),
            em_by_hops={h: _mean(row["em"] for row in info if row["hops"] == h) for h in hops},
            searches=_mean(row["searches"] for row in info),
        )


def roll_out(
    trainer: Any,
    questions: Sequence[dict[str, Any]],
    *,
    sample: bool = False,
    seed: int = 0,
    beliefs: bool = False,
) -> list[Trajectory]:
    """
    One rollout per question, by the trainer's own rollout loop in evaluation mode.

    Args:
        trainer ([`SandboxGRPOTrainer`]): Trainer from [`make_trainer`], trained or not.
        questions (sequence of `dict`): Rows of [`make_dataset`].
        sample (`bool`, *optional*, defaults to `False`): Sample at temperature 1 instead of decoding greedily.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling. The state of torch's generator is restored.
        beliefs (`bool`, *optional*, defaults to `False`): Also score the belief before every turn.

    Returns:
        `list[Trajectory]`: their `info` has `em`, `f1`, `prediction`, `hops`, `searches` and `id`.
    """
    trajectories: list[Trajectory] = []

    def collect(inputs: list[dict[str, Any]], output: dict[str, Any]) -> None:
        trajectories.extend(to_trajectories(trainer, inputs, output, beliefs=beliefs))

    training, sink, generation = trainer.model.training, trainer.sink, trainer.generation_config
    trainer.model.eval()
    trainer.sink = collect
    if not sample:
        sampling = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        trainer.generation_config = GenerationConfig(**generation.to_diff_dict() | {"do_sample": False} | sampling)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for first in range(0, len(questions), trainer.args.per_device_eval_batch_size):
                rows = [dict(row) for row in questions[first : first + trainer.args.per_device_eval_batch_size]]
                trainer._generate_and_score_completions(rows)
    finally:
        trainer.model.train(training)
        trainer.sink, trainer.generation_config = sink, generation
        trainer._metrics["eval"].clear()
    return trajectories


def to_trajectories(
    trainer: Any, inputs: list[dict[str, Any]], output: dict[str, Any], *, beliefs: bool = False
) -> list[Trajectory]:
    """Records of a scored batch, see [`roll_out`]."""
    step = Step.from_output(inputs, output, training=False)
    if beliefs:
        probes = [build_probes(trainer.processing_class, row["answers"], ANSWER_TEMPLATE) for row in inputs]
        log_probs = score_beliefs(trainer.model, step.sequences, step.boundaries, probes, batch_size=len(inputs))
        step.set_beliefs([reduce_aliases(rollout) for rollout in log_probs])
    records = trajectories_of(step, trainer.processing_class)
    for record, row in zip(records, inputs, strict=True):
        prediction = extract_answer(record.turns[-1].text)
        em, f1 = (score(prediction, row["answers"]) for score in (exact_match, f1_score))
        record.outcome, record.rewards = f1, {"f1": f1}
        info = {"id": row["id"], "hops": row["hops"], "searches": len(record.turns) - 1, "prediction": prediction}
        record.info = info | {"em": em, "f1": f1}
    return records


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
