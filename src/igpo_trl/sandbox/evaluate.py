"""Evaluation in the sandbox: rolls out with the trainer in evaluation mode, and scores the trajectories."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..beliefs import build_probes, score_beliefs
from ..rewards import exact_match, extract_answer, f1_score
from ..trajectory import Trajectory, Turn
from ..turns import turn_spans
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
    tokenizer = trainer.processing_class
    lengths = output["completion_mask"].sum(dim=1)
    turn_index, starts, num_turns = turn_spans(output["tool_mask"], lengths)
    prompts = [ids[m.bool()].tolist() for ids, m in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
    completions = [ids[:n].tolist() for ids, n in zip(output["completion_ids"], lengths, strict=True)]
    bounds = [[*row[:n].tolist(), len(ids)] for row, n, ids in zip(starts, num_turns, completions, strict=True)]
    belief: list[list[float | None]] = [[None] * (len(row) - 1) for row in bounds]
    if beliefs:
        scores = score_beliefs(
            trainer.model,
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            [[len(prompt) + start for start in row[:-1]] for prompt, row in zip(prompts, bounds, strict=True)],
            [build_probes(tokenizer, row["answers"], ANSWER_TEMPLATE) for row in inputs],
            batch_size=len(inputs),
        )
        belief = [row.amax(dim=1).exp().tolist() for row in scores]
    records = []
    for i, row in enumerate(inputs):
        turns = []
        for k, (start, stop) in enumerate(zip(bounds[i], bounds[i][1:], strict=False)):
            sampled = int((turn_index[i] == k).sum())
            text, seen = (
                tokenizer.decode(completions[i][a:b]) for a, b in ((start, start + sampled), (start + sampled, stop))
            )
            gain = None
            if belief[i][k] is not None and k + 1 < len(belief[i]):
                gain = belief[i][k + 1] - belief[i][k]  # type: ignore[operator]
            turns.append(Turn(text, seen, sampled, belief[i][k], gain))
        prediction = extract_answer(turns[-1].text)
        em, f1 = (score(prediction, row["answers"]) for score in (exact_match, f1_score))
        info = {"id": row["id"], "hops": row["hops"], "searches": len(turns) - 1, "prediction": prediction}
        text = tokenizer.decode(prompts[i])
        records.append(Trajectory(text, turns, row["answers"], f1, {"f1": f1}, info=info | {"em": em, "f1": f1}))
    return records


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
