"""
Trains on rollouts that need different numbers of rounds on each process; used and started by `test_sharded.py`.

Sampling is real: the model's own `generate` runs in every round, with all the collectives that sharded parameters
bring, and only the choice of each token is scripted.
"""

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import packed_obstacle

NUM_ROLLOUTS = 4
HANGS_AFTER = 420  # seconds
GENERATE = GenerationMixin.generate
# ZeRO-3 keeps parameters below this size whole on every process: in a large model the norms, which alone have fewer
# elements than this here; by default all of a tiny model.
PERSISTENCE_THRESHOLD = 100


def rollout(num_calls: int, answer: str) -> list[str]:
    """One text per turn: this many searches, and an answer."""
    return [tiny.call(("Paris", "Rome")[i % 2]) for i in range(num_calls)] + [tiny.answer(answer)]


# Scripts of the rollouts of each step. With two processes the first two rollouts are the first one's.
EVEN = [[rollout(2, "Paris"), rollout(2, "Rome"), rollout(1, "Rome"), rollout(2, "Paris")]]
UNEVEN = [
    [rollout(1, "Paris"), rollout(0, "Rome"), rollout(4, "Rome"), rollout(2, "Paris")],
    [rollout(4, "Rome"), rollout(3, "Paris"), rollout(0, "Paris"), rollout(0, "Rome")],
]
SHORT = [[rollout(0, "Paris"), rollout(0, "Rome"), rollout(1, "Rome"), rollout(0, "Paris")]]
# One process always pads, and keeps all activations: what is computed is the same up to rounding. Advantages are gains
# divided by their standard deviation, which is so small in a random model that it makes differences of 1e-4 out of
# those that float32 leaves: two cases have float64.
CASES: dict[str, dict[str, Any]] = {
    "even": {"scripts": EVEN, "pad_to_longest": True},
    "uneven": {"scripts": UNEVEN, "pad_to_longest": False, "gradient_checkpointing": True, "dtype": torch.float64},
    "lora": {"scripts": UNEVEN, "lora": True, "pad_to_longest": True, "dtype": torch.float64},
    # The reference model is then a frozen copy of the adapter.
    "continued": {"scripts": UNEVEN, "continued": True, "beta": 0.5, "pad_to_longest": True, "dtype": torch.float64},
    # Beliefs are then scored against the keys and values of the forward that gives the old log-probabilities.
    "old_log_probs": {"scripts": UNEVEN[:1], "num_iterations": 2, "pad_to_longest": True},
    "accumulated": {
        "scripts": UNEVEN[:1],
        "num_iterations": 2,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "pad_to_longest": False,
    },
    # ZeRO-3 then gathers the parameters in every forward of a generation, which is slow, not once before it.
    "ungathered": {"scripts": SHORT, "ds3_gather_for_generation": False, "pad_to_longest": False},
}


class Say(LogitsProcessor):
    """
    Leaves one possible token per row, that of its script; a row without one (or at its end) is sampled freely.

    `log_probs` is what the policy itself gave to the tokens of each row: the same on one process and on several, or
    the forward passes of generation went wrong.
    """

    def __init__(self, said: list[list[int]], prompt_width: int):
        self.said, self.prompt_width = said, prompt_width
        self.log_probs: list[list[float]] = [[] for _ in said]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        log_probs = scores.log_softmax(dim=-1)
        for row, ids in enumerate(self.said):
            if step < len(ids):
                self.log_probs[row].append(log_probs[row, ids[step]].item())
                scores[row] = -torch.inf
                scores[row, ids[step]] = 0.0
        return scores


class Trainer(IGPOTrainer):
    """Rollout i of step s says `scripts[s][i]`, through real generation."""

    scripts: list[list[list[str]]] = []

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.records: list[dict[str, Any]] = []  # one per generation batch
        self.held = 0  # forwards whose keys and values beliefs were scored against
        self._rollouts: list[tuple[list[int], list[str]]] = []  # ids so far, turns still to be said

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self._rows, self._said = self._next_turns(prompt_ids)
        self.records[-1]["rounds"].append(sum(row is not None for row in self._rows))
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def say(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of every model's `generate`, below whatever else is wrapped around it."""
        processor = Say(self._said, kwargs["input_ids"].shape[1])
        output = GENERATE(model, *args, logits_processor=LogitsProcessorList([processor]), **kwargs)
        for row, log_probs in zip(self._rows, processor.log_probs, strict=True):
            if row is not None:
                self.records[-1]["log_probs"][row].append(log_probs)
        return output

    def _score_captured_rows(self, *args: Any) -> None:
        super()._score_captured_rows(*args)
        self.held += 1

    def _next_turns(self, prompt_ids: list[list[int]]) -> tuple[list[int | None], list[list[int]]]:
        """The rollout that each row continues, and its next turn; none where a row is there to keep step only."""
        if not self._rollouts:
            script = self.scripts[self.state.global_step]
            first = self.accelerator.process_index * len(prompt_ids)
            self._rollouts = [(list(ids), list(script[first + i])) for i, ids in enumerate(prompt_ids)]
            self.records[-1]["log_probs"] = [[] for _ in prompt_ids]
        rows: list[int | None] = []
        said: list[list[int]] = []
        for ids in prompt_ids:
            row, turn = None, []
            for i, (history, turns) in enumerate(self._rollouts):
                if i not in rows and turns and ids[: len(history)] == history:
                    row = i
                    turn = [*self._tokenizer.encode(turns[0], add_special_tokens=False), self._tokenizer.eos_token_id]
                    self._rollouts[i] = (list(ids) + turn, turns[1:])
                    break
            rows.append(row)
            said.append(turn)
        return rows, said

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollouts = []
        self.records.append({"rounds": []})
        output = super()._generate_and_score_completions(inputs)
        assert not any(turns for _, turns in self._rollouts), "a script was not said to its end"
        lengths = output["completion_mask"].sum(dim=1).tolist()
        for name in ("completion_ids", "advantages"):
            self.records[-1][name] = [row[:n] for row, n in zip(output[name], lengths, strict=True)]
        return output


def allow_fsdp_on_cpu() -> None:
    """Let Accelerate shard on CPU processes: it turns its FSDP plugin on for accelerators only, and says nothing."""
    initialize = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an all-reduce for inference, which training has no use for, at start-up."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def full_parameters(trainer: IGPOTrainer) -> dict[str, torch.Tensor]:
    """All parameters, gathered on every process."""
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    if trainer._dist.is_zero3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: value.detach().clone() for name, value in named.items()}
    return {name: getattr(value, "full_tensor", value.clone)().detach() for name, value in named.items()}


def count_elements(trainer: IGPOTrainer) -> dict[str, int]:
    """Parameter elements of this process, of those that it keeps whole all the time, and of those that it updates."""
    parameters = list(trainer.model.parameters())
    if trainer._dist.is_zero3:
        shard = sum(p.ds_tensor.numel() for p in parameters)
        whole = sum(p.ds_numel for p in parameters if p.ds_persist)
        updated = trainer.optimizer.optimizer.fp32_partitioned_groups_flat
    else:
        updated = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        shard = sum(local(p).numel() for p in parameters)
        whole = sum(p.numel() for p in parameters if not isinstance(p, DTensor))
    return {"shard": shard, "whole": whole, "updated": sum(local(p).numel() for p in updated)}


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def adapter(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


def run(
    folder: Path,
    num_processes: int,
    scripts: list[list[list[str]]],
    lora: bool = False,
    continued: bool = False,
    dtype: torch.dtype = torch.float32,
    gradient_accumulation_steps: int = 1,
    **options: Any,
) -> dict[str, Any]:
    if num_processes == 1:
        options |= {"pad_to_longest": True, "gradient_checkpointing": False}
    model = tiny.make_model("qwen3").to(dtype)
    if lora:
        options["peft_config"] = adapter(init_lora_weights="gaussian")
    if continued:
        torch.manual_seed(1)
        model = get_peft_model(model, adapter(init_lora_weights=False))
    Trainer.scripts = scripts
    trainer = tiny.make_trainer(
        Trainer,
        IGPOConfig,
        folder,
        model=model,
        per_device_train_batch_size=NUM_ROLLOUTS // num_processes // gradient_accumulation_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_generations=NUM_ROLLOUTS,  # the group lies across the processes
        max_completion_length=512,
        lr_scheduler_type="constant",
        learning_rate=0.1,
        gamma=0.9,
        optim="sgd",  # proportional to the gradient, so that rounding is not blown up
        **{"max_steps": len(scripts)} | options,
    )
    accelerator, plugin = trainer.accelerator, trainer.accelerator.state.deepspeed_plugin
    if plugin:
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENCE_THRESHOLD
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    with mock.patch.object(GenerationMixin, "generate", lambda *args, **kwargs: trainer.say(*args, **kwargs)):
        trainer.train()
    result = {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "zero_stage": plugin.zero_stage if plugin else None,
        "elements": count_elements(trainer),
        "records": trainer.records,
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "start": start,
        "end": full_parameters(trainer),
        "held": trainer.held,
        "obstacle": packed_obstacle(trainer.model),
    }
    trainer.save_model(str(folder / "saved"))
    return result


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)  # says where each process waits for the other
    allow_fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        skip_shared_memory_op()
    for case in cases:
        result = run(folder / case, 2, **CASES[case])
        torch.save(result, folder / f"{case}-rank{result['process_index']}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a communication thread that still lives would abort the interpreter on its way out


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
