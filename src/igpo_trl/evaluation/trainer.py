"""The trainer, in evaluation mode: its rollouts as records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..records import trajectories_of
from ..rewards import Variant, exact_match, extract_answer, f1_score, last_assistant_text, make_answer_reward
from ..rollout.tool_results import ToolErrorKind
from ..trainer import IGPOTrainer
from ..trajectory import Trajectory
from .questions import Row
from .settings import EvaluationSettings, make_arguments


class EvaluationTrainer(IGPOTrainer):
    """The trainer, in evaluation mode, with its rollouts as records."""

    def rollouts(self, rows: Sequence[Row], settings: EvaluationSettings) -> list[Trajectory]:
        """
        One rollout for each of these rows; every process has to bring the same number of them.

        Raises:
            ConnectionError: a search has failed, which is nothing that the model has done.
        """
        with torch.no_grad():
            self._generate_and_score_completions(
                [{"prompt": row["prompt"], "answers": row["answers"]} for row in rows]
            )
        self._metrics["eval"].clear()
        self._refuse_failed_searches()
        records = trajectories_of(self._current_step, self._tokenizer)
        return [
            self._complete(record, i, row, settings.variant)
            for i, (record, row) in enumerate(zip(records, rows, strict=True))
        ]

    def _refuse_failed_searches(self) -> None:
        errors = self._current_step.round_log.errors
        failed = sum(errors[kind] for kind in (ToolErrorKind.RAISED, ToolErrorKind.TIMEOUT))
        if not self.max_over_ranks(failed):
            return
        told = [
            message["content"]
            for messages in self._current_step.completions
            for message in messages
            if _failed(message)
        ]
        told.sort(key=lambda text: not text.startswith(("Error: search failed", "Error: search gave no result")))
        raise ConnectionError(
            f"searches have failed ({told[0] if failed else 'on another process'}). Nothing of this batch is kept; "
            "mend the search service, and give the same command again to go on."
        )

    def _complete(self, record: Trajectory, i: int, row: Row, variant: Variant) -> Trajectory:
        """The record of rollout i with its scores and what identifies it."""
        messages = self._current_step.completions[i]
        response = last_assistant_text(messages)
        prediction = extract_answer(response, variant)
        f1, em = (score(prediction, row["answers"], variant) for score in (f1_score, exact_match))
        record.answers, record.outcome, record.rewards = row["answers"], f1, {"f1": f1, "exact_match": em}
        record.info = {
            "dataset": row["dataset"],
            "id": row["id"],
            "sample": row["sample"],
            "hops": row["hops"],
            "question": row["prompt"][-1]["content"],
            "response": response,
            "prediction": prediction,
            "f1": f1,
            "em": em,
            "searches": sum(message.get("role") == "tool" for message in messages),
            "failed_calls": sum(map(_failed, messages)),
            "tokens_observed": len(self._current_step.completion_ids[i])
            - sum(turn.num_tokens for turn in record.turns),
        }
        return record


def _failed(message: dict[str, Any]) -> bool:
    """Whether a message is the result of a call that could not be read or run."""
    return message.get("role") == "tool" and message["content"].startswith("Error: ")


def make_evaluator(
    settings: EvaluationSettings, output_dir: str | Path, tool: Any, batch_size: int
) -> EvaluationTrainer:
    """Loads the model into a trainer that never trains."""
    args = make_arguments(settings, output_dir, batch_size)
    if args.distributed_state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            "evaluation keeps a whole model in every process, got a launch with "
            f"{args.distributed_state.distributed_type.value}. Launch it as plain data parallel."
        )
    dtype = settings.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=dtype, attn_implementation=settings.attn_implementation
    )
    tokenizer_from = settings.model
    if settings.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, settings.adapter)
        if Path(settings.adapter, "tokenizer_config.json").is_file():
            tokenizer_from = settings.adapter
    trainer = EvaluationTrainer(
        model=model,
        reward_funcs=make_answer_reward(format_penalty=0.0, variant=settings.variant),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ""}], "answers": ["-"]}]),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_from, padding_side="left", truncation_side="left"),
        tools=[tool],
    )
    trainer.model.eval()
    return trainer
