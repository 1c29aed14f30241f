"""Rolls out with a stand-in for the client of a vLLM server, under TRL's own `generate`, in two processes."""

import re
from pathlib import Path
from typing import Any

import tiny
from trl.generation.vllm_generation import VLLMGeneration

from igpo_trl import IGPOConfig, IGPOTrainer

MAX_MODEL_LEN = 720


class Client:
    """Samples what each prompt's own question asks for, and refuses what a server refuses."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.requests = []

    def get_server_info(self):
        return {"model_config": {"max_model_len": MAX_MODEL_LEN}}

    def generate(self, prompts, n, max_tokens, **_):
        self.requests.append((len(prompts), n, max_tokens))
        if any(len(ids) + max_tokens > MAX_MODEL_LEN for ids in prompts):
            raise RuntimeError("Request failed: 400, max_tokens is too large")
        turns = [ids for prompt in prompts for ids in [self.turn(prompt)[:max_tokens]] * n]
        # The log-probability of a token names its rollout: prompt ids end in the question's number.
        logprobs = [[[-float(self.number(prompt))]] * len(self.turn(prompt)[:max_tokens]) for prompt in prompts]
        return {
            "prompt_ids": prompts,
            "completion_ids": turns,
            "logprobs": [values for values in logprobs for _ in range(n)],
            "logprob_token_ids": None,
        }

    def number(self, prompt):
        found = re.search(r"author (\d+)", self.tokenizer.decode(prompt))
        return int(found.group(1)) if found else 999

    def turn(self, prompt):
        """Question i is searched for i times before it is answered; the turn may be half sampled already."""
        text = self.tokenizer.decode(prompt)
        if not text.count("<|im_start|>"):
            return self.tokenizer.encode("idle " * 10)
        number, begun = self.number(prompt), text.rpartition("<|im_start|>assistant\n")[2]
        searches = text.count("<tool_response>")
        turn = tiny.call(f"author {number}") if searches < number else tiny.answer(f"author {number}")
        assert turn.startswith(begun), (turn, begun)
        return [*self.tokenizer.encode(turn)[len(self.tokenizer.encode(begun)) :], self.tokenizer.eos_token_id]


class Generation(VLLMGeneration):
    """TRL's `generate` with everything around it left out."""

    def __init__(self, trainer):
        self.accelerator, self.mode, self.logprobs = trainer.accelerator, "server", 0
        self.temperature = self.top_p = self.repetition_penalty = 1.0
        self.top_k, self.min_p, self.generation_kwargs, self.structured_outputs_regex = 0, None, {}, None
        self.max_completion_length = trainer.max_completion_length
        self.vllm_client = Client(trainer._tokenizer) if trainer.accelerator.is_main_process else None

    def sync_weights(self):
        pass


class Trainer(IGPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # With the option, TRL would look for a vLLM that is installed and a server that runs.
        self.use_vllm, self.vllm_mode, self._last_loaded_step = True, "server", -1
        self.vllm_generation = Generation(self)
        from igpo_trl.components import make_rollout_loop

        self._rollout_loop, self._reuses_prefixes = make_rollout_loop(self), False

    def _generate(self, prompts):
        self.generated = super()._generate(prompts)
        return self.generated


def run(folder: Path) -> dict[str, Any]:
    """What this process got."""
    trainer = tiny.make_trainer(
        Trainer, IGPOConfig, folder / "output", per_device_train_batch_size=4, max_completion_length=300
    )
    rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == 2
    # Groups of two. Rank 0 has questions 0 and 3, rank 1 has 1 and 2: their live rollouts differ after turn 1.
    numbers = [[0, 0, 3, 3], [1, 1, 2, 2]][rank]
    prompts = [[{"role": "user", "content": f"Where was author {i} born?"}] for i in numbers]
    trainer._generate_and_score_completions([{"prompt": prompt, "answers": ["author 3"]} for prompt in prompts])
    prompt_ids, completion_ids, masks, completions, logprobs, *_ = trainer.generated
    return {
        "numbers": numbers,
        "texts": [trainer._tokenizer.decode(ids) for ids in completion_ids],
        "roles": [[message["role"] for message in messages] for messages in completions],
        "logprobs": [
            sorted({value for value, sampled in zip(values, mask, strict=True) if sampled})
            for values, mask in zip(logprobs, masks, strict=True)
        ],
        "longest": max(len(a) + len(b) for a, b in zip(prompt_ids, completion_ids, strict=True)),
        "stops": [str(stop) for stop in trainer.current_step.round_log.stops],
        "requests": trainer.vllm_generation.vllm_client.requests if rank == 0 else None,
    }
