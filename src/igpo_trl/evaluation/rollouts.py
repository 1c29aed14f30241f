"""The rollouts of an evaluation, made batch by batch with the trainer in evaluation mode."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..config import IGPOConfig
from ..records import trajectories_of
from ..rewards import Variant, exact_match, extract_answer, f1_score, last_assistant_text, make_answer_reward
from ..rollout.tool_results import ToolErrorKind
from ..search import Passage, Searchable, SearchTool, open_search
from ..search.searchable import Retriever
from ..tools import make_stop_tools
from ..trainer import IGPOTrainer
from ..trajectory import RolloutKey, Trajectory, key_of
from .calibration import CALIBRATION
from .forced_answers import shares_of_right_answers
from .run import RunDirectory, append_lines
from .settings import EvaluationSettings, Row, load_rows, questions_digest


def roll_out(settings: EvaluationSettings, out: str | Path, batch_size: int | None = None) -> list[Trajectory]:
    """
    Makes one rollout for every question and sample that the run does not have yet.

    Each batch is on disk before the next one starts, so a run that was killed resumes where it stopped.

    Args:
        settings ([`EvaluationSettings`]): What to run.
        out (`str` or `Path`): Directory of the run: a new one, or that of a run with the same settings and questions.
        batch_size (`int`, *optional*): Rollouts at a time in each process. Defaults to 16, or 256 with vLLM.

    Returns:
        `list` of [`Trajectory`]: All rollouts of the run; empty on processes other than the main one.

    Raises:
        FileExistsError: The directory holds other files, or a run with other settings or questions.
        BlockingIOError: Another process is working on the same run.
        ConnectionError: Searches fail. The batches before are on disk.
        FileNotFoundError, ValueError: See [`EvaluationSettings.resolve`] and [`load_questions`].
    """
    settings.resolve()
    batch_size = batch_size or (256 if settings.vllm else 16)
    arguments = make_arguments(settings, out, batch_size)
    state = arguments.distributed_state or PartialState()
    rows = load_rows(settings)
    indexes = [open_search(index) for index in settings.indexes]
    run = RunDirectory(Path(out))
    with run.lock() if state.is_main_process else nullcontext():
        if state.is_main_process:
            run.open(asdict(settings), questions_digest(rows))
        state.wait_for_everyone()
        completed = {key_of(trajectory) for trajectory in run.trajectories()}
        if any(RolloutKey.of_record(row) not in completed for row in rows):
            index = _CurrentIndex(indexes)
            tool = SearchTool(index, k=settings.k, max_words=settings.max_words, many_queries=settings.many_queries)
            trainer = make_trainer(settings, arguments, tool)
            _run_batches(trainer, settings, index, rows, completed, run)
        state.wait_for_everyone()
        return run.trajectories() if state.is_main_process else []


class _CurrentIndex(Retriever):
    """The index of the data set that is being run."""

    def __init__(self, indexes: Sequence[Searchable]):
        self.indexes, self.number = indexes, 0

    def _search_batch(self, queries: list[str], k: int) -> list[list[Passage]]:
        return self.indexes[self.number].search_batch(queries, k)


def _run_batches(
    trainer: "EvaluationTrainer",
    settings: EvaluationSettings,
    index: _CurrentIndex,
    rows: Sequence[Row],
    completed: set[RolloutKey],
    run: RunDirectory,
) -> None:
    """
    Rolls out the batches that are not completed.

    The batches are those of a run that is never interrupted. A batch of which only a part is on disk is made again as
    a whole with the same seed, and its missing rollouts are written.
    """
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    batch_size = trainer.args.per_device_eval_batch_size * world
    f1: list[float] = []
    options = {"disable": True} if rank else {}
    with tqdm(total=len(rows), initial=len(completed), desc="rollouts", unit="", **options) as bar:
        for number in sorted({row["index"] for row in rows}):
            index.number = number
            group = [row for row in rows if row["index"] == number]
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                missing = [row for row in batch if RolloutKey.of_record(row) not in completed]
                if not missing:
                    continue
                share = -(-len(batch) // world)
                own = batch[rank * share : (rank + 1) * share]
                # Every process needs the same number of rows: one that has too few repeats a question.
                filled = own + batch[:1] * (share - len(own))
                set_seed(_batch_seed(settings.seed, filled[0], rank))
                rollouts = trainer.rollouts(filled, settings)[: len(own)]
                rollouts = [trajectory for trajectory in rollouts if key_of(trajectory) not in completed]
                append_lines(run.rollout_file(rank), [trajectory.to_json() for trajectory in rollouts])
                f1 += [trajectory.info["f1"] for trajectory in rollouts]
                bar.update(len(missing))
                bar.set_postfix(f1=f"{100 * sum(f1) / max(1, len(f1)):.1f}")


def _batch_seed(seed: int, row: Row, rank: int) -> int:
    """A seed that depends on the batch only, not on whether the run was interrupted before it."""
    text = f"{seed}|{row['dataset']}|{row['id']}|{row['sample']}|{rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def make_arguments(settings: EvaluationSettings, output_dir: str | Path, batch_size: int) -> IGPOConfig:
    """Arguments of the trainer. Raises `TypeError` or `ValueError` for wrong fields in `settings.rollout`."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": 2,  # a training batch needs two rollouts of a question, even if none is made
        "num_generations": 2,
        "num_generations_eval": 1,
        "info_gain_weight": 0.0,
        "belief_at_eval": settings.beliefs,
        "temperature": settings.temperature or 1.0,
        "seed": settings.seed,
        "use_vllm": settings.vllm,
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        **settings.rollout,
        "vllm_importance_sampling_correction": False,  # there is no loss to correct
    }
    if settings.temperature == 0:
        unset = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        greedy = {"temperature": 0.0} if settings.vllm else {"do_sample": False, **unset}
        options["generation_kwargs"] = {**(options.get("generation_kwargs") or {}), **greedy}
    return IGPOConfig(**options)


def make_trainer(settings: EvaluationSettings, arguments: IGPOConfig, tool: Any) -> "EvaluationTrainer":
    """Loads the model into a trainer that only evaluates. Raises `ValueError` under DeepSpeed and FSDP."""
    distributed_type = arguments.distributed_state.distributed_type
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"evaluation needs the whole model in every process, got a launch with {distributed_type.value}. Launch "
            "it as plain data parallel."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.model,
        dtype=settings.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        attn_implementation=settings.attn_implementation,
    )
    tokenizer = settings.model
    if settings.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, settings.adapter)
        if Path(settings.adapter, "tokenizer_config.json").is_file():
            tokenizer = settings.adapter
    tokenizer = settings.tokenizer or tokenizer
    rows = arguments.generation_batch_size // arguments.num_generations  # as many as a training step would need
    trainer = EvaluationTrainer(
        model=model,
        reward_funcs=make_answer_reward(format_penalty=0.0, variant=settings.variant),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ""}], "answers": ["-"]}] * rows),
        processing_class=AutoTokenizer.from_pretrained(tokenizer, padding_side="left", truncation_side="left"),
        tools=[tool, *make_stop_tools(arguments.stop_tools)],
    )
    trainer.model.eval()
    return trainer


class EvaluationTrainer(IGPOTrainer):
    """[`IGPOTrainer`] in evaluation mode, which returns its rollouts as records."""

    def rollouts(self, rows: Sequence[Row], settings: EvaluationSettings) -> list[Trajectory]:
        """One rollout for each row; every process needs the same number. Raises `ConnectionError` if searches fail."""
        with torch.no_grad():
            self._generate_and_score_completions(
                [{"prompt": row["prompt"], "answers": row["answers"]} for row in rows]
            )
        self._metrics["eval"].clear()
        self._check_searches()
        records = trajectories_of(self.current_step, self._tokenizer)
        for i, (record, row) in enumerate(zip(records, rows, strict=True)):
            self._add_scores(record, i, row, settings.variant)
        if settings.calibration is not None:
            self._add_calibration(records, settings.calibration, settings.variant)
        return records

    def _add_calibration(self, records: Sequence[Trajectory], samples: int, variant: Variant) -> None:
        """Add to each record the share of right answers that are sampled in the state before each of its turns."""
        step = self.current_step
        assert step.belief_batch is not None  # `calibration` needs beliefs
        states = [(i, start) for i, starts in enumerate(step.turn_starts) for start in starts]
        shares = shares_of_right_answers(
            self.accelerator.unwrap_model(self.model),
            self._tokenizer,
            [[*step.prompt_ids[i], *step.completion_ids[i][:start]] for i, start in states],
            [step.belief_batch.probes[i][0] for i, _ in states],
            [records[i].answers for i, _ in states],
            self._belief_scorer.template,
            samples=samples,
            variant=variant,
        )
        for record in records:
            record.info[CALIBRATION] = []
        for (i, _), share in zip(states, shares, strict=True):
            records[i].info[CALIBRATION].append(share)

    def _check_searches(self) -> None:
        errors = self.current_step.round_log.errors
        failed = errors[ToolErrorKind.RAISED] + errors[ToolErrorKind.TIMEOUT]
        if not self.max_over_ranks(failed):
            return
        completions = self.current_step.completions
        texts = [message["content"] for messages in completions for message in messages if _failed(message)]
        texts.sort(key=lambda text: not text.startswith(("Error: search failed", "Error: search gave no result")))
        raise ConnectionError(
            f"searches have failed ({texts[0] if failed else 'on another process'}). Nothing of this batch is kept. "
            "Fix the search service, and run the same command again to resume."
        )

    def _add_scores(self, record: Trajectory, i: int, row: Row, variant: Variant) -> None:
        """Add to the record of rollout i its scores and what identifies its question."""
        messages, stop_tools = self.current_step.completions[i], self.args.stop_tools or ()
        response = last_assistant_text(messages)
        prediction = extract_answer(response, variant)
        f1, em = (score(prediction, row["answers"], variant) for score in (f1_score, exact_match))
        record.outcome, record.rewards = f1, {"f1": f1, "exact_match": em}
        record.answers, record.data_set = row["answers"], row["dataset"]
        record.info = {
            **{name: row[name] for name in ("dataset", "id", "sample", "hops")},
            "question": row["prompt"][-1]["content"],
            "response": response,
            "prediction": prediction,
            "f1": f1,
            "em": em,
            # Whether the first turn calls a tool in a way that can be read and run.
            "first_call": len(messages) > 1 and messages[1].get("role") == "tool" and not _failed(messages[1]),
            "searches": sum(m.get("role") == "tool" and m["name"] not in stop_tools for m in messages),
            "failed_calls": sum(map(_failed, messages)),
            "tokens_observed": len(self.current_step.completion_ids[i]) - sum(t.num_tokens for t in record.turns),
        }


def _failed(message: dict[str, Any]) -> bool:
    """Whether a message is the result of a call that could not be read or run."""
    return message.get("role") == "tool" and message["content"].startswith("Error: ")
