"""Trains scripted rollouts and gives back what each process got; started by `test_two_processes.py`."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from accelerate import PartialState
from distributed import vllm_server

import igpo_trl.beliefs.scorer
from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.rollout.tool_failures import FailureWatch, ToolCounts, ToolUnavailable
from igpo_trl.training.console import StepLines

SEARCH = tiny.call("Paris")
# The two halves need different numbers of tool rounds, and the last rollouts no belief at all.
SCRIPTS = [
    [SEARCH, tiny.call("Rome"), SEARCH, tiny.answer("Paris")],
    [tiny.call("Rome"), tiny.answer("Rome")],
    [tiny.answer("Paris")],
    ["I do not know."],
]
CASES = [
    {"normalization": normalization, "num_generations": num_generations}
    for normalization in ("joint", "separate", "per_turn", "critic")
    for num_generations in (2, 4)  # 4: with two rollouts per process the group lies across them
]
# Microbatches of one and of two rollouts, in two iterations; the first process has most of the tokens.
PADDING_CASES = [
    {"scripts": SCRIPTS},
    {"scripts": [SCRIPTS[i] for i in (3, 0, 0, 1, 2, 1, 3, 3)]},
]
PADDING = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2, "learning_rate": 0.1}


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = SCRIPTS
    output = None

    def _generate_and_score_completions(self, inputs):
        self.output = super()._generate_and_score_completions(inputs)
        return self.output


class Evaluating(tiny.Scripted, IGPOTrainer):
    """Right about the first three authors, after a search."""

    def _generate(self, prompts):
        right = [any(f"author {i} " in prompt[-1]["content"] for i in range(3)) for prompt in prompts]
        mine = [[SEARCH, tiny.answer("Paris")] if each else [tiny.answer("Rome")] for each in right]
        self.scripts = [[]] * (self.accelerator.process_index * len(mine)) + mine
        return super()._generate(prompts)


def evaluate(folder: Path) -> dict[str, float]:
    """Five questions in batches of two per process: two processes fill their last batch with three repeated ones."""
    trainer = tiny.make_trainer(
        Evaluating,
        IGPOConfig,
        folder / "output",
        eval_dataset=tiny.make_dataset(5),
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        belief_at_eval=True,
    )
    return trainer.evaluate()


def train(
    folder: Path,
    num_processes: int,
    scripts: list[list[str]] = SCRIPTS,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """What this process got from the rollouts of one generation batch."""
    forwards, score = [], igpo_trl.beliefs.scorer.score_beliefs

    def count(model, *args, **options):
        hook = model.register_forward_hook(lambda *_: forwards.append(1))
        try:
            return score(model, *args, **options)
        finally:
            hook.remove()

    accumulation = options.get("gradient_accumulation_steps", 1)
    with mock.patch.object(igpo_trl.beliefs.scorer, "score_beliefs", count):
        trainer = tiny.make_trainer(
            Trainer,
            IGPOConfig,
            folder / "output",
            model=tiny.make_model("qwen3").to(dtype),
            per_device_train_batch_size=len(scripts) // num_processes // accumulation,
            belief_tokens_per_batch=1,
            lr_scheduler_type="constant",
            gamma=0.9,
            optim="sgd",  # proportional to the gradient, so that rounding is not blown up
            **options,
        )
        trainer.scripts = scripts
        trainer.add_callback(StepLines(trainer))
        accelerator = trainer.accelerator
        # A launcher that quietly starts one process would make every comparison pass.
        assert accelerator.num_processes == num_processes, accelerator.num_processes
        assert accelerator.distributed_type.value == ("MULTI_CPU" if num_processes > 1 else "NO")
        with contextlib.redirect_stdout(io.StringIO()) as console:
            trainer.train()
    lengths = trainer.output["completion_mask"].sum(dim=1).tolist()
    return {
        "case": options,
        "ids": [row[:n].tolist() for row, n in zip(trainer.output["completion_ids"], lengths, strict=True)],
        "advantages": [row[:n].clone() for row, n in zip(trainer.output["advantages"], lengths, strict=True)],
        "logs": [
            {key: value for key, value in log.items() if "second" not in key} for log in trainer.state.log_history
        ],
        "console": console.getvalue().splitlines(),
        "forwards": len(forwards),
        "parameters": {
            name: value.detach().clone() for name, value in accelerator.unwrap_model(trainer.model).named_parameters()
        },
    }


def stop(folder: Path) -> str:
    """The error of a tool that fails on the last process only."""
    watch = FailureWatch(max_share=0.5, patience=1, output_dir=folder)
    last = PartialState().is_last_process
    try:
        watch.update({"search": ToolCounts(6, 6, 6, "it is gone")} if last else {"search": ToolCounts(5)})
    except ToolUnavailable as error:
        return str(error)
    return ""


def end_of_run(output: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """A run whose first checkpoint has rollouts left over, or one that resumes at such a checkpoint."""
    trainer = tiny.make_trainer(
        Trainer,
        IGPOConfig,
        output,
        per_device_train_batch_size=2,
        num_iterations=2,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train(checkpoint and str(checkpoint))
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return {"weights": weights, "step": trainer._step}


def run(folder: Path, num_processes: int) -> dict[str, Any]:
    return {
        # In float32, advantages differ by 1e-4: they are gains divided by their tiny standard deviation.
        "cases": [train(folder, num_processes, dtype=torch.float64, **case) for case in CASES],
        "padding": [
            [train(folder, num_processes, **PADDING, **case, pad_to_longest=padded) for padded in (True, False)]
            for case in PADDING_CASES
        ],
        "stopped": stop(folder),
        "evaluation": evaluate(folder),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    result = run(folder, 2) | {
        "whole": end_of_run(folder / "whole"),
        "resumed": end_of_run(folder / "resumed", folder / "whole/checkpoint-1"),
        "of one process": end_of_run(folder / "more", folder / "one/checkpoint-1"),
    }
    rank = PartialState().process_index
    torch.save(result, folder / f"rank{rank}.pt")
    (folder / f"vllm{rank}.json").write_text(json.dumps(vllm_server.run(folder)))
    torch.distributed.barrier()
    os._exit(0)  # a communication thread that still lives would abort the interpreter on its way out


if __name__ == "__main__":
    main(Path(sys.argv[1]))
