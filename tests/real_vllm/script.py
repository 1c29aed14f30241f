"""
Trains [`IGPOTrainer`] on vLLM, and compares on every step what vLLM says with plain forwards of the trainer's model.

`python script.py FOLDER OPTIONS`, or the same under torchrun: FOLDER has `model`, `index` and `questions.jsonl`,
OPTIONS is a JSON object. Each process writes what it measured to FOLDER/NAME-RANK.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import cpu

os.environ.update(cpu.ENVIRONMENT)

import oracles  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402

from igpo_trl import IGPOConfig, IGPOTrainer, components  # noqa: E402
from igpo_trl.data import load_questions  # noqa: E402
from igpo_trl.sandbox.tiny_model import SYSTEM_PROMPT  # noqa: E402
from igpo_trl.search import BM25Index, SearchTool  # noqa: E402

LORA = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": True}


class Trainer(IGPOTrainer):
    """Measures every generation batch before it is trained on."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.measured: list[dict[str, Any]] = []
        self.before: dict[str, torch.Tensor] | None = None

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        self.live.append(len(prompt_ids))
        turns, values = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.accelerator.process_index > 0 and len(self.live) == 1:
            # Half of the second process's rollouts end with their first turn: there are fewer of them in the next.
            for each in (turns, values):
                each[: len(each) // 2] = [row[:2] for row in each[: len(each) // 2]]
        return turns, values

    def _generate(self, prompts: Any) -> Any:
        self.live: list[int] = []
        self.generated = super()._generate(prompts)
        return self.generated

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        model, step = self.accelerator.unwrap_model(self.model), self.current_step
        prompt_ids, completion_ids, masks, _, sampling, *_ = self.generated
        rows = list(zip(prompt_ids, completion_ids, masks, strict=True))
        plain = [log_probs(model, *row, self.temperature) for row in rows]
        theirs = [
            torch.tensor([value for value, sampled in zip(values, mask, strict=True) if sampled])
            for values, mask in zip(sampling, masks, strict=True)
        ]
        moved = 0.0  # how far off the weights before the last update would be
        if self.before is not None:
            old = [log_probs(model, *row, self.temperature, self.before) for row in rows]
            moved = largest_difference(theirs, old)
        self.before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        assert step.belief_batch is not None
        expected = oracles.beliefs(model, step.sequences, step.boundaries, step.belief_batch.probes)
        beliefs = [torch.tensor(scores).flatten().exp() for scores in expected]
        self.measured.append(
            {
                "log_probs": largest_difference(theirs, plain),
                "moved": moved,
                "beliefs": largest_difference([x.flatten().exp() for x in step.belief_batch.log_probs], beliefs),
                "scored": sum(map(len, beliefs)),
                "weights": weight_difference(self, model) if self.vllm_mode == "colocate" else None,
                "live": self.live,
                "turns": [len(starts) for starts in step.turn_starts],
                "tokens": [len(prompt) + len(completion) for prompt, completion, _ in rows],
                "stops": [str(stop) for stop in step.round_log.stops],
                "sampled": sum(map(len, theirs)),
                "advantages": list(output["advantages"].shape),
                "advantages_differ": bool(max(len(set(row.tolist()) - {0.0}) for row in output["advantages"]) > 1),
            }
        )
        return output


@torch.no_grad()
def log_probs(
    model: Any,
    prompt: list[int],
    completion: list[int],
    mask: list[int],
    temperature: float,
    weights: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Log-probabilities of the sampled tokens of one rollout: one forward, no padding, no cache."""
    training = model.training
    model.eval()
    inputs = {"input_ids": torch.tensor([[*prompt, *completion]]), "use_cache": False}
    logits = torch.func.functional_call(model, weights or {}, (), inputs).logits[0, len(prompt) - 1 : -1]
    model.train(training)
    values = (logits.float() / temperature).log_softmax(dim=-1)
    return values.gather(1, torch.tensor(completion)[:, None])[:, 0][torch.tensor(mask).bool()]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    assert [x.shape for x in first] == [x.shape for x in second]
    return max((float((x - y).abs().max()) for x, y in zip(first, second, strict=True) if x.numel()), default=0.0)


@torch.no_grad()
def weight_difference(trainer: Trainer, model: Any) -> float:
    """Between the engine's weights in this process and the trainer's, adapters merged."""
    engine = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    theirs = dict(engine.named_parameters())
    ours = {name: value.detach().clone() for name, value in trainer.vllm_generation._iter_named_params()}
    differences = []
    for name, value in theirs.items():
        for fused, parts in (("qkv_proj", "q_proj k_proj v_proj"), ("gate_up_proj", "gate_proj up_proj")):
            if fused in name:
                expected = torch.cat([ours[name.replace(fused, part)] for part in parts.split()])
                break
        else:
            # The vocabulary is padded.
            expected = ours[name]
            assert not value[len(expected) :].any()
        differences.append(float((value[: len(expected)] - expected).abs().max()))
    return max(differences)


def main(folder: Path, name: str, lora: bool = False, asks_server: bool = True, **options: Any) -> None:
    torch.set_num_threads(1)
    if not asks_server:
        components.context_length = lambda trainer: trainer.model.config.max_position_embeddings
    getattr(cpu, f"patch_{'colocate' if options['vllm_mode'] == 'colocate' else 'client'}")()
    trainer = Trainer(
        model=str(folder / "model"),
        args=IGPOConfig(
            **{
                "output_dir": str(folder / name),
                "use_vllm": True,
                "model_init_kwargs": {"dtype": "float32"},
                "per_device_train_batch_size": 8,  # with one group, gains or outcomes may all be equal
                "num_generations": 4,
                "max_steps": 3,
                "max_completion_length": 400,
                "max_tool_calling_iterations": 3,
                "learning_rate": 1e-4,  # more, and log-probabilities of which float32 has fewer digits
                "lr_scheduler_type": "constant",
                "normalization": "separate",
                "info_gain": "log_prob_diff",
                "answer_template": "<answer> {answer} </answer>",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
            }
            | options
        ),
        train_dataset=load_questions(folder / "questions.jsonl", system_prompt=SYSTEM_PROMPT),
        tools=[SearchTool(BM25Index.load(folder / "index"), k=2, max_words=12)],
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train()
    result = {
        "processes": trainer.accelerator.num_processes,
        "max_model_len": components.context_length(trainer),
        "steps": trainer.measured,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }
    rank = trainer.accelerator.process_index
    (folder / f"{name}-{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # threads of the engine, or of gloo, would abort the interpreter on its way out


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
