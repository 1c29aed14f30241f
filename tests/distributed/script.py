"""Trains scripted rollouts and writes down what each process got; started by `test_two_processes.py`."""

import sys
from pathlib import Path

import tiny
import torch

import igpo_trl.beliefs.scorer
from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.rollout.tool_failures import FailureWatch, ToolCounts, ToolUnavailable

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


def main(folder: Path, num_processes: int) -> None:
    torch.set_num_threads(1)
    forwards, score = [], igpo_trl.beliefs.scorer.score_beliefs

    def count(model, *args, **options):
        hook = model.register_forward_hook(lambda *_: forwards.append(1))
        try:
            return score(model, *args, **options)
        finally:
            hook.remove()

    igpo_trl.beliefs.scorer.score_beliefs = count
    results = []
    for case in CASES:
        forwards.clear()
        trainer = tiny.make_trainer(
            Trainer,
            IGPOConfig,
            folder / "output",
            per_device_train_batch_size=4 // num_processes,
            belief_tokens_per_batch=1,
            lr_scheduler_type="constant",
            gamma=0.9,
            optim="sgd",  # proportional to the gradient, so that rounding is not blown up
            **case,
        )
        accelerator = trainer.accelerator
        # A launcher that quietly starts one process would make every comparison pass.
        assert accelerator.num_processes == num_processes, accelerator.num_processes
        assert accelerator.distributed_type.value == ("MULTI_CPU" if num_processes > 1 else "NO")
        trainer.train()
        lengths = trainer.output["completion_mask"].sum(dim=1).tolist()
        log = {key: value for key, value in trainer.state.log_history[0].items() if "second" not in key}
        results.append(
            {
                "case": case,
                "ids": [row[:n].tolist() for row, n in zip(trainer.output["completion_ids"], lengths, strict=True)],
                "advantages": [row[:n].clone() for row, n in zip(trainer.output["advantages"], lengths, strict=True)],
                "log": log,
                "forwards": len(forwards),
                "parameters": {
                    name: value.detach().clone()
                    for name, value in accelerator.unwrap_model(trainer.model).named_parameters()
                },
            }
        )
    watch = FailureWatch(max_share=0.5, patience=1, output_dir=folder)
    try:  # the tool fails on the last process only
        last = accelerator.is_last_process
        watch.update({"search": ToolCounts(6, 6, 6, "it is gone")} if last else {"search": ToolCounts(5)})
    except ToolUnavailable as error:
        results[0]["stopped"] = str(error)
    results.append({"evaluation": evaluate(folder)})
    torch.save(results, folder / f"rank{accelerator.process_index}of{num_processes}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
