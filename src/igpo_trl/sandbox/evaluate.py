"""Evaluation in the sandbox: rolls out with the trainer in evaluation mode, and scores the trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from trl import GRPOTrainer

from ..beliefs import build_probes, reduce_aliases, score_beliefs
from ..beliefs.scorer import BeliefBatch
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
        by_hops = {number: _mean("em", [row for row in info if row["hops"] == number]) for number in hops}
        return cls(_mean("em", info), _mean("f1", info), by_hops, _mean("searches", info))


def _mean(name: str, rows: list[dict[str, Any]]) -> float:
    return sum(row[name] for row in rows) / len(rows) if rows else float("nan")


def roll_out(
    trainer: GRPOTrainer,
    questions: Sequence[dict[str, Any]],
    *,
    sample: bool = False,
    seed: int = 0,
    beliefs: bool = False,
) -> list[Trajectory]:
    """
    One rollout per row of [`make_dataset`], by the trainer's own rollout loop in evaluation mode.

    Decodes greedily, or samples at temperature 1 with a seed of its own: torch's generator is restored afterwards. The
    `info` of a record has `em`, `f1`, `prediction`, `hops`, `searches` and `id`.
    """
    trajectories: list[Trajectory] = []
    training, generation = trainer.model.training, trainer.generation_config
    trainer.model.eval()
    if not sample:
        sampling = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        trainer.generation_config = GenerationConfig(**generation.to_diff_dict() | {"do_sample": False} | sampling)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for first in range(0, len(questions), trainer.args.per_device_eval_batch_size):
                rows = [dict(row) for row in questions[first : first + trainer.args.per_device_eval_batch_size]]
                output = trainer._generate_and_score_completions(rows)
                trajectories += to_trajectories(trainer, rows, output, beliefs=beliefs)
    finally:
        trainer.model.train(training)
        trainer.generation_config = generation
        trainer._metrics["eval"].clear()
    return trajectories


def to_trajectories(
    trainer: GRPOTrainer,
    rows: list[dict[str, Any]],
    output: dict[str, Any],
    *,
    beliefs: bool = False,
    training: bool = False,
    **fields: Any,
) -> list[Trajectory]:
    """Records of a scored batch, see [`roll_out`]. `fields` are further ones of its [`Step`]."""
    step = Step.from_output(rows, output, training=training, **fields)
    if beliefs:
        probes = [build_probes(trainer.processing_class, row["answers"], ANSWER_TEMPLATE) for row in rows]
        log_probs = score_beliefs(trainer.model, step.sequences, step.boundaries, probes, batch_size=len(rows))
        step.belief_batch = BeliefBatch(probes, log_probs=log_probs)
        step.set_beliefs([reduce_aliases(rollout) for rollout in log_probs])
    records = trajectories_of(step, trainer.processing_class)
    for record, row in zip(records, rows, strict=True):
        prediction = extract_answer(record.turns[-1].text)
        em, f1 = (score(prediction, row["answers"]) for score in (exact_match, f1_score))
        record.outcome, record.rewards = f1, {"f1": f1}
        info = {"id": row["id"], "hops": row["hops"], "searches": len(record.turns) - 1, "prediction": prediction}
        record.info = info | {"em": em, "f1": f1}
    return records
