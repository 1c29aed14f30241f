"""Tiny models and a tokenizer, built in code, and a way to make a random policy say what a test wants it to say."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen2_5_chat_template

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CORPUS = [
    "system user assistant You are a helpful assistant. Where was the author of the book born?",
    "Paris is the capital of France. Rome is the capital of Italy. I do not know, so I search.",
    '{"name": "search", "arguments": {"query": "who wrote it"}} <answer> Paris </answer>',
    "Now there's enough information to answer",
]


def make_tokenizer(chat_template: str | None = qwen2_5_chat_template) -> PreTrainedTokenizerFast:
    """Byte-level BPE: encodes any text, merges across words' first letters as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.padding_side = "left"
    fast.chat_template = chat_template
    return fast


def make_model(family: str = "qwen3", vocab_size: int = 400, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """
    A model of about 100k parameters with weights far larger than is usual, so that its probabilities differ.

    `family` is one of `qwen2`, `qwen3`, `llama`, `gpt2`, `mistral` (window 8), `qwen2_sliding` (every second layer).
    """
    import transformers

    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    if family == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        shape = {names.get(key, key): value for key, value in shape.items()}
        for key in ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings"):
            del shape[key]
        shape["n_positions"] = 1024
    if family == "mistral":
        shape["sliding_window"] = 8
    if family == "qwen2_sliding":
        shape |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    if family in ("qwen2", "qwen2_sliding"):
        del shape["head_dim"]
    prefix = {"qwen2_sliding": "Qwen2", "gpt2": "GPT2", "llama": "Llama"}.get(family, family.capitalize())
    config = getattr(transformers, f"{prefix}Config")(**shape | overrides)
    model_class = getattr(transformers, f"{prefix}LMHeadModel" if family == "gpt2" else f"{prefix}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config)
    model.config._name_or_path = f"tiny-{family}"
    return model


def call(query: str, name: str = "search") -> str:
    """An assistant turn that calls a tool, in the form of the chat template."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"query": "{query}"}}}}\n</tool_call>'


QWEN3_5_CALL = "<tool_call>\n<function=search>\n<parameter=query>\nParis\n</parameter>\n</function>\n</tool_call>"


def answer(text: str) -> str:
    return f"<answer>{text}</answer>"


def search(query: str) -> str:
    """
    Searches.

    Args:
        query: What to look for.

    Returns:
        A passage.
    """
    return f"{query} is the capital of France."


def make_dataset(num_rows: int = 8, **columns: Any) -> Dataset:
    """Questions whose right answer is Paris, with an alias."""
    prompts = [[{"role": "user", "content": f"Where was author {i} born?"}] for i in range(num_rows)]
    return Dataset.from_dict({"prompt": prompts, "answers": [["Paris", "City of Light"]] * num_rows} | columns)


class Scripted:
    """
    Trainer mixin: rollout i of every global generation batch says `scripts[i]`, one text (or list of ids) per turn.

    The trainer's tool loop, masks, rewards and loss are untouched: only the sampling is replaced.
    """

    scripts: Sequence[Sequence[str | list[int]]] = ()

    def _generate(self, prompts):
        self._rollouts: list[tuple[list[int], list[str | list[int]]]] = []  # ids so far, what is still to be said
        return super()._generate(prompts)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self._rollouts:
            first = self.accelerator.process_index * len(prompt_ids)
            mine = [list(self.scripts[(first + i) % len(self.scripts)]) for i in range(len(prompt_ids))]
            self._rollouts = list(zip([list(ids) for ids in prompt_ids], mine, strict=True))
            rows = list(range(len(prompt_ids)))
        else:
            # Rows come in order, some left out: each is the next rollout that it continues.
            rows, i = [], 0
            for ids in prompt_ids:
                while ids[: len(self._rollouts[i][0])] != self._rollouts[i][0]:
                    i += 1
                rows.append(i)
                i += 1
        completions = []
        for row, ids in zip(rows, prompt_ids, strict=True):
            said = self._rollouts[row][1].pop(0)
            if isinstance(said, str):
                said = [*self._tokenizer.encode(said, add_special_tokens=False), self._tokenizer.eos_token_id]
            completions.append(said)
            self._rollouts[row] = (list(ids) + said, self._rollouts[row][1])
        return completions, None


def make_trainer(trainer_class: Any, config_class: Any, output_dir: Any, **options: Any) -> Any:
    """A trainer on tiny things; an option goes to the config or, where it has no such field, to the trainer."""
    config: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 256,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    arguments: dict[str, Any] = {"train_dataset": make_dataset(), "tools": [search]}
    for name, value in options.items():
        (config if name in config_class.__dataclass_fields__ else arguments)[name] = value
    arguments.setdefault("model", make_model("qwen3"))
    arguments.setdefault("processing_class", make_tokenizer())
    arguments.setdefault("args", config_class(**config))
    return trainer_class(**arguments)
